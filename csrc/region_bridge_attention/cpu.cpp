// region_bridge_attention, CPU: encoder_attention's kernels over prefix and patches, then what the regions add (kernel.h).
//
// The backward pass of the prefix and patch rows is torch's: given the final log-sum-exp and the final output, its
// probabilities and its corrections are those of the whole row.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>

#include "checks.h"
#include "encoder_attention/cpu.h"
#include "heads.h"
#include "isa.h"
#include "region_bridge_attention/kernel.h"
#include "scratch.h"

namespace zs3fast::region_bridge_attention {
namespace {

const Kernels& kernels() { return ZS3FAST_FOR_ISA(); }

constexpr char kOp[] = "region_bridge_attention";

void check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t num_prefix, at::IntArrayRef grid,
           at::IntArrayRef regions) {
  check_size(kOp, "grid", grid);
  check_size(kOp, "regions", regions);
  TORCH_CHECK_VALUE(regions[0] <= grid[0] && regions[1] <= grid[1], kOp, ": regions ", regions, " do not fit the grid ",
                    grid);
  TORCH_CHECK_VALUE(num_prefix >= 1 && num_prefix <= kMaxPixels, kOp, ": num_prefix: expected at least 1, got ", num_prefix);
  const int64_t others = grid[0] * grid[1] + regions[0] * regions[1];
  check_floats(kOp, "q", q, at::kCPU, {kAny, kAny, kAny, kAny});
  check_floats(kOp, "k", k, at::kCPU, {q.size(0), q.size(1), num_prefix + others, q.size(3)});
  check_floats(kOp, "v", v, at::kCPU, {q.size(0), q.size(1), num_prefix + others, q.size(3)});
  TORCH_CHECK_VALUE(q.size(1) >= 1 && q.size(3) >= 1 && q.size(2) > others && q.size(2) <= num_prefix + others, kOp,
                    ": q: expected 1 to ", num_prefix, " prefix rows, ", others, " patches and regions, got ", q.sizes());
}

template <class T>
Rows<T> head(const at::Tensor& x, int64_t b, int64_t h) {
  return {static_cast<T*>(x.data_ptr()) + b * x.stride(0) + h * x.stride(1), x.stride(2)};
}

struct Problem {
  int64_t batch, heads, queries, regions, block_q, block_k;  // block: prefix and patches
  Layout layout;
  at::IntArrayRef grid;

  Problem(const at::Tensor& q, const at::Tensor& k, int64_t num_prefix, at::IntArrayRef grid, at::IntArrayRef count,
          double scale)
      : batch(q.size(0)), heads(q.size(1)), queries(q.size(2)), regions(count[0] * count[1]),
        block_q(queries - regions), block_k(k.size(2) - regions), grid(grid) {
    const int64_t patches = grid[0] * grid[1];
    layout = {block_q - patches, num_prefix,         patches,   grid[1],
              count[1],          grid[0] / count[0], grid[1] / count[1], q.size(3), static_cast<float>(scale)};
  }

  at::Tensor q_block(const at::Tensor& x) const { return x.narrow(2, 0, block_q); }
  at::Tensor k_block(const at::Tensor& x) const { return x.narrow(2, 0, block_k); }

  // The rows of the block that no region touches: prefix, and the margin outside all windows.
  void copy_untouched(const at::Tensor& to, const at::Tensor& block) const {
    const int64_t prefix = block.size(2) - layout.patches;
    const int64_t covered_h = regions / layout.regions_w * layout.wh, covered_w = layout.regions_w * layout.ww;
    to.narrow(2, 0, prefix).copy_(block.narrow(2, 0, prefix));
    const auto patches = [&](const at::Tensor& x) { return x.narrow(2, prefix, layout.patches).unflatten(2, grid); };
    const auto out = patches(to), in = patches(block);  // [B, heads, h, w, dh]
    if (covered_h < grid[0]) out.slice(2, covered_h).copy_(in.slice(2, covered_h));
    if (covered_w < grid[1]) out.slice(3, covered_w).copy_(in.slice(3, covered_w));
  }

  // task(scratch, b, h, region); neighbouring tasks are the heads of one region, whose rows lie side by side.
  template <class Task>
  void for_each_region(const Task& task) const {
    at::parallel_for(0, batch * regions * heads, 1, [&](int64_t begin, int64_t end) {
      ScratchArena scratch = ScratchArena::of_floats(layout.wh * layout.ww + 1 + layout.dh);
      for (int64_t i = begin; i < end; ++i) task(scratch.floats(), i / heads / regions, i % heads, i / heads % regions);
    });
  }
};

template <class T>
void add_regions(const Problem& problem, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                 const at::Tensor& output, float* lse, void (*forward)(const Forward<T>&, int64_t, float*)) {
  problem.for_each_region([&](float* scratch, int64_t b, int64_t h, int64_t region) {
    const Forward<T> f{problem.layout,
                       head<const T>(q, b, h),
                       head<const T>(k, b, h),
                       head<const T>(v, b, h),
                       head<T>(output, b, h),
                       lse + (b * problem.heads + h) * problem.queries};
    forward(f, region, scratch);
  });
}

std::tuple<at::Tensor, at::Tensor> by_name(const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in,
                                           int64_t num_prefix, at::IntArrayRef grid, at::IntArrayRef regions,
                                           double scale, std::string_view name) {
  check(q_in, k_in, v_in, num_prefix, grid, regions);
  const auto type = encoder_attention::computed_in(q_in.scalar_type());
  const auto q = rows_in(q_in, type), k = rows_in(k_in, type), v = rows_in(v_in, type);
  const Problem problem(q, k, num_prefix, grid, regions, scale);
  const auto output = empty_heads(q);
  const auto lse = at::empty({problem.batch, problem.heads, problem.queries}, q.options().dtype(at::kFloat));
  if (problem.batch == 0) return {output.to(q_in.scalar_type()), lse};

  encoder_attention::attend(problem.q_block(q), problem.k_block(k), problem.k_block(v), problem.q_block(output),
                            lse.data_ptr<float>(), problem.queries, scale, name);
  if (type == at::kFloat)
    add_regions<float>(problem, q, k, v, output, lse.data_ptr<float>(), kernels().forward);
  else
    add_regions<uint16_t>(problem, q, k, v, output, lse.data_ptr<float>(), kernels().forward_bf16);
  return {output.to(q_in.scalar_type()), lse};
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                           int64_t num_prefix, at::IntArrayRef grid, at::IntArrayRef regions,
                                           double scale) {
  return by_name(q, k, v, num_prefix, grid, regions, scale, "");
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad_output_in, const at::Tensor& q_in,
                                                        const at::Tensor& k_in, const at::Tensor& v_in,
                                                        const at::Tensor& output_in, const at::Tensor& lse_in,
                                                        int64_t num_prefix, at::IntArrayRef grid,
                                                        at::IntArrayRef regions, double scale) {
  check(q_in, k_in, v_in, num_prefix, grid, regions);
  check_floats(kOp, "grad_output", grad_output_in, at::kCPU, {q_in.size(0), q_in.size(1), q_in.size(2), q_in.size(3)});
  check_floats(kOp, "output", output_in, at::kCPU, {q_in.size(0), q_in.size(1), q_in.size(2), q_in.size(3)});
  check_floats(kOp, "lse", lse_in, at::kCPU, {q_in.size(0), q_in.size(1), q_in.size(2)});
  const auto q = rows_of(q_in), k = rows_of(k_in), v = rows_of(v_in);
  const auto grad_output = rows_of(grad_output_in), output = rows_of(output_in), lse = lse_in.contiguous();
  const Problem problem(q, k, num_prefix, grid, regions, scale);
  auto dq = empty_heads(q), dk = empty_heads(k), dv = empty_heads(v);
  if (problem.batch == 0)
    return {dq.to(q_in.scalar_type()), dk.to(k_in.scalar_type()), dv.to(v_in.scalar_type())};

  const auto [block_dq, block_dk, block_dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      problem.q_block(grad_output), problem.q_block(q), problem.k_block(k), problem.k_block(v),
      problem.q_block(output), problem.q_block(lse), 0.0, false, {}, scale);
  problem.copy_untouched(dq, block_dq);
  problem.copy_untouched(dk, block_dk);
  problem.copy_untouched(dv, block_dv);
  const auto& kernel = kernels();
  problem.for_each_region(
      [&, &block_dq = block_dq, &block_dk = block_dk, &block_dv = block_dv](float*, int64_t b, int64_t h,
                                                                            int64_t region) {
        const Backward g{problem.layout,
                         head<const float>(grad_output, b, h),
                         head<const float>(q, b, h),
                         head<const float>(k, b, h),
                         head<const float>(v, b, h),
                         head<const float>(output, b, h),
                         lse.data_ptr<float>() + (b * problem.heads + h) * problem.queries,
                         head<const float>(block_dq, b, h),
                         head<const float>(block_dk, b, h),
                         head<const float>(block_dv, b, h),
                         head<float>(dq, b, h),
                         head<float>(dk, b, h),
                         head<float>(dv, b, h)};
        kernel.backward(g, region);
      });
  return {dq.to(q_in.scalar_type()), dk.to(k_in.scalar_type()), dv.to(v_in.scalar_type())};
}

}  // namespace
}  // namespace zs3fast::region_bridge_attention

TORCH_LIBRARY_IMPL(zs3fast_cpp, CPU, m) {
  m.impl("region_bridge_attention", zs3fast::region_bridge_attention::forward);
  m.impl("region_bridge_attention_by", zs3fast::region_bridge_attention::by_name);
  m.impl("region_bridge_attention_backward", zs3fast::region_bridge_attention::backward);
}
