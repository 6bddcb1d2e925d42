// self_similarity_attention, CPU: sum over the pairs (l, r) of softmax(scale l r^T + prior) v, patch queries alone.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "isa.h"
#include "scratch.h"
#include "self_similarity_attention/kernel.h"

namespace zs3fast::self_similarity_attention {
namespace {

const Kernels& kernels() { return ZS3FAST_FOR_ISA(); }

template <class T>
Heads<T> heads_of(const at::Tensor& x) {
  return {x.data_ptr<float>(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

std::vector<float> prior(int64_t size, double std) {
  std::vector<float> table(size);
  for (int64_t i = 0; i < size; ++i) table[i] = static_cast<float>(std::exp(-double(i * i) / (2 * std * std)));
  return table;
}

at::Tensor forward(const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in,
                   const std::string& similarity, double scale, at::IntArrayRef grid, int64_t num_prefix,
                   std::optional<double> std) {
  constexpr char op[] = "self_similarity_attention";
  check_size(op, "grid", grid);
  TORCH_CHECK_VALUE(num_prefix >= 0 && num_prefix <= kMaxPixels, op, ": num_prefix: expected at least 0, got ", num_prefix);
  check_floats(op, "q", q_in, at::kCPU, {kAny, kAny, num_prefix + grid[0] * grid[1], kAny});
  check_floats(op, "k", k_in, at::kCPU, {q_in.size(0), q_in.size(1), q_in.size(2), q_in.size(3)});
  check_floats(op, "v", v_in, at::kCPU, {q_in.size(0), q_in.size(1), q_in.size(2), q_in.size(3)});
  TORCH_CHECK_VALUE(q_in.size(1) >= 1 && q_in.size(3) >= 1, op, ": heads and dh: expected at least 1, got ", q_in.sizes());
  TORCH_CHECK_VALUE(!std.has_value() || *std > 0, op, ": std: expected more than 0, got ", std.value_or(0));
  // half types are computed in fp32: their inputs are small beside the scores that are never stored
  const auto q = q_in.to(at::kFloat), k = k_in.to(at::kFloat), v = v_in.to(at::kFloat);
  const int64_t batch = q.size(0), heads = q.size(1), tokens = q.size(2), patches = grid[0] * grid[1];
  // lying in memory as [B, N, heads, dh]: what the next linear layer reads without a copy
  auto output = at::empty({batch, patches, heads, v.size(3)}, q.options()).transpose(1, 2);

  std::vector<float> rows, columns;
  Problem problem{tokens,  num_prefix, grid[0], grid[1],  q.size(3), static_cast<float>(scale),
                  nullptr, nullptr,    0,       {},       {},        heads_of<const float>(v),
                  heads_of<float>(output)};
  if (std.has_value()) {
    rows = prior(grid[0], *std);
    columns = prior(grid[1], *std);
    problem.rows = rows.data();
    problem.columns = columns.data();
  }
  const auto add = [&](const at::Tensor& left, const at::Tensor& right) {
    problem.left[problem.streams] = heads_of<const float>(left);
    problem.right[problem.streams++] = heads_of<const float>(right);
  };
  if (similarity == "qq" || similarity == "qq+kk") add(q, q);
  if (similarity == "kk" || similarity == "qq+kk") add(k, k);
  if (similarity == "qk") add(q, k);
  TORCH_CHECK(problem.streams > 0, "self_similarity_attention: similarity: expected qq, kk, qq+kk or qk, got ",
              similarity);

  const Kernels& kernel = kernels();
  const int64_t pairs = batch * heads, threads = at::get_num_threads();
  const int64_t blocks = (patches + kQueryBlock - 1) / kQueryBlock;
  // no more queries a task than gives every thread one; whole vectors each
  const int64_t wanted = std::max(blocks, std::min((threads + std::max<int64_t>(pairs, 1) - 1) / std::max<int64_t>(pairs, 1), (patches + 15) / 16));
  const int64_t step = ((patches + wanted - 1) / wanted + 15) / 16 * 16;
  const int64_t tasks = (patches + step - 1) / step;
  at::parallel_for(0, pairs * tasks, 1, [&](int64_t begin, int64_t end) {
    ScratchArena scratch = ScratchArena::of_floats(kernel.scratch(problem));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t pair = i / tasks, first = i % tasks * step;
      kernel.forward(problem, pair / heads, pair % heads, first, std::min(first + step, patches), scratch.floats());
    }
  });
  return output.to(q_in.scalar_type());
}

}  // namespace
}  // namespace zs3fast::self_similarity_attention

TORCH_LIBRARY_IMPL(zs3fast_cpp, CPU, m) {
  m.impl("self_similarity_attention", zs3fast::self_similarity_attention::forward);
}
