// attention_to_mask, CPU: o = dropout(softmax(scale q k^T)) v and masks = mean over heads of scale q k^T, in one pass.
//
// Why not torch's SDPA and a matmul for the masks: on one core of an AVX-512 EPYC, fp32, heads = 8, dh = 64, C = 171,
// N = 1024, that takes 7.5 ms forward and 25.6 with backward where this takes 5.0 and 15.9 (stored scores: 14.0, 18.8),
// and dropout sends SDPA to a path that stores the scores: 36.3 against 18.3 in training. At C = 20 stored scores tie.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <string_view>
#include <tuple>

#include "attention_to_mask/kernel.h"
#include "checks.h"
#include "encoder_attention/cpu.h"
#include "heads.h"
#include "isa.h"
#include "scratch.h"

namespace zs3fast::attention_to_mask {
namespace {

const Kernels& kernels() { return ZS3FAST_FOR_ISA(); }

template <class T>
Heads<T> heads_of(const at::Tensor& x) {
  return {x.data_ptr<float>(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

Sizes sizes_of(const at::Tensor& q, const at::Tensor& k) {
  return {q.size(0), q.size(1), q.size(2), k.size(2), q.size(3)};
}

Dropout dropout_of(double p, const std::optional<at::Tensor>& seed) {
  if (p == 0.0) return {false, 0, 0, 0, 1.0f};
  TORCH_CHECK(seed.has_value(), "attention_to_mask: dropout_p = ", p, " needs a seed");
  const auto key = static_cast<uint64_t>(seed->item<int64_t>());
  return {true, static_cast<uint32_t>(std::floor(p * 4294967296.0)), static_cast<uint32_t>(key),
          static_cast<uint32_t>(key >> 32), static_cast<float>(1.0 / (1.0 - p))};
}

constexpr char kOp[] = "attention_to_mask";
constexpr int64_t kBlock = 64;  // queries of encoder_attention's: fewer in float32 are faster here

void check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double dropout_p,
           const std::optional<at::Tensor>& seed) {
  check_floats(kOp, "q", q, at::kCPU, {kAny, kAny, kAny, kAny});
  const int64_t B = q.size(0), heads = q.size(1), N = k.dim() == 4 ? k.size(2) : kAny, dh = q.size(3);
  check_floats(kOp, "k", k, at::kCPU, {B, heads, N, dh});
  check_floats(kOp, "v", v, at::kCPU, {B, heads, N, dh});
  TORCH_CHECK_VALUE(heads >= 1 && dh >= 1 && N >= 1, kOp, ": heads, dh and N: expected at least 1, got q ", q.sizes(),
                    " and k ", k.sizes());
  TORCH_CHECK_VALUE(dropout_p >= 0 && dropout_p < 1, kOp, ": dropout_p: expected in [0, 1), got ", dropout_p);
  if (seed.has_value()) check_tensor(kOp, "seed", *seed, at::kCPU, {});
}

// Without dropout and masks this is plain attention, by a kernel of encoder_attention's: output and log-sum-exp.
std::tuple<at::Tensor, at::Tensor> by_name(const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in,
                                           double scale, std::string_view name) {
  check(q_in, k_in, v_in, 0.0, {});
  const auto type = encoder_attention::computed_in(q_in.scalar_type());
  const auto q = rows_in(q_in, type), k = rows_in(k_in, type), v = rows_in(v_in, type);
  const auto output = empty_heads(q);
  const auto lse = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
  if (output.numel() > 0) encoder_attention::attend(q, k, v, output, lse.data_ptr<float>(), q.size(2), scale, name);
  return {output.to(q_in.scalar_type()), lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& q_in, const at::Tensor& k_in,
                                                       const at::Tensor& v_in, double scale, double dropout_p,
                                                       const std::optional<at::Tensor>& seed, bool need_masks) {
  check(q_in, k_in, v_in, dropout_p, seed);
  if (dropout_p == 0.0 && !need_masks && (q_in.scalar_type() == at::kBFloat16 || q_in.size(2) >= kBlock)) {
    auto [output, lse] = by_name(q_in, k_in, v_in, scale, "");
    return {output, at::empty({0}, output.options()), lse};
  }
  // half types are computed in fp32: their inputs are small beside the scores that are never stored
  const auto q = q_in.to(at::kFloat), k = k_in.to(at::kFloat), v = v_in.to(at::kFloat);
  const Sizes size = sizes_of(q, k);
  auto output = empty_heads(q);
  auto lse = at::empty({size.batch, size.heads, size.classes}, q.options());
  auto masks = need_masks ? at::empty({size.batch, size.classes, size.patches}, q.options()) : at::empty({0}, q.options());

  const Kernels& kernel = kernels();
  const int64_t threads = at::get_num_threads();
  const int64_t vectors = (size.classes + kernel.lanes - 1) / kernel.lanes;  // of classes
  // Summing the scores over heads inside a task leaves B * C blocks to share out; where those are too few for the
  // threads, one full-width product makes the masks and the heads are shared out too.
  const bool fused = need_masks && size.batch * vectors >= threads;
  const int64_t groups = fused ? 1 : size.heads, heads = size.heads / groups;
  const int64_t wanted = (threads + size.batch * groups - 1) / std::max<int64_t>(size.batch * groups, 1);
  const int64_t largest = kClassBlock / kernel.lanes;
  const int64_t blocks = std::max((vectors + largest - 1) / largest, std::min(wanted, vectors));
  const int64_t step = blocks == 0 ? 1 : (vectors + blocks - 1) / blocks * kernel.lanes;

  const Forward f{size, static_cast<float>(scale), dropout_of(dropout_p, seed), heads_of<const float>(q),
                  heads_of<const float>(k), heads_of<const float>(v), heads_of<float>(output),
                  fused ? masks.data_ptr<float>() : nullptr, lse.data_ptr<float>()};
  at::parallel_for(0, size.batch * groups * blocks, 1, [&](int64_t begin, int64_t end) {
    ScratchArena scratch = ScratchArena::of_floats(kernel.forward_scratch(size, heads, step));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t c0 = task % blocks * step, group = task / blocks % groups, b = task / blocks / groups;
      const int64_t c1 = std::min(c0 + step, size.classes);
      if (c0 < c1) kernel.forward(f, b, group * heads, (group + 1) * heads, c0, c1, scratch.floats());
    }
  });
  if (need_masks && !fused) {
    const int64_t wide = size.heads * size.width;
    at::bmm_out(masks, q.transpose(1, 2).reshape({size.batch, size.classes, wide}) * (scale / size.heads),
                k.transpose(1, 2).reshape({size.batch, size.patches, wide}).transpose(1, 2));
  }
  return {output.to(q_in.scalar_type()), masks.to(q_in.scalar_type()), lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad_output_in,
                                                        const std::optional<at::Tensor>& grad_masks_in,
                                                        const at::Tensor& q_in, const at::Tensor& k_in,
                                                        const at::Tensor& v_in, const at::Tensor& output_in,
                                                        const at::Tensor& lse, double scale, double dropout_p,
                                                        const std::optional<at::Tensor>& seed) {
  check(q_in, k_in, v_in, dropout_p, seed);
  const int64_t B = q_in.size(0), C = q_in.size(2);
  check_floats(kOp, "grad_output", grad_output_in, at::kCPU, {B, q_in.size(1), C, q_in.size(3)});
  check_floats(kOp, "output", output_in, at::kCPU, {B, q_in.size(1), C, q_in.size(3)});
  check_floats(kOp, "lse", lse, at::kCPU, {B, q_in.size(1), C});
  if (grad_masks_in.has_value()) check_floats(kOp, "grad_masks", *grad_masks_in, at::kCPU, {B, C, k_in.size(2)});
  const auto q = q_in.to(at::kFloat), k = k_in.to(at::kFloat), v = v_in.to(at::kFloat);
  const auto output = output_in.to(at::kFloat), grad_output = grad_output_in.to(at::kFloat);
  const auto log_sums = lse.contiguous();
  const Sizes size = sizes_of(q, k);
  auto dq = empty_heads(q), dk = empty_heads(k), dv = empty_heads(v);
  if (size.classes == 0) return {dq, dk.zero_().to(k_in.scalar_type()), dv.zero_().to(v_in.scalar_type())};

  const Kernels& kernel = kernels();
  at::Tensor grad_masks;  // transposed once here, not once a head
  if (grad_masks_in.has_value()) {
    const int64_t padded = (size.classes + kernel.lanes - 1) / kernel.lanes * kernel.lanes;
    grad_masks = at::zeros({size.batch, size.patches, padded}, q.options());
    grad_masks.narrow(2, 0, size.classes).copy_(grad_masks_in->transpose(1, 2)).div_(size.heads);
  }

  const Backward g{size, static_cast<float>(scale), dropout_of(dropout_p, seed), heads_of<const float>(q),
                   heads_of<const float>(k), heads_of<const float>(v), heads_of<const float>(output),
                   heads_of<const float>(grad_output), log_sums.data_ptr<float>(),
                   grad_masks.defined() ? grad_masks.data_ptr<float>() : nullptr, heads_of<float>(dq),
                   heads_of<float>(dk), heads_of<float>(dv)};
  at::parallel_for(0, size.batch * size.heads, 1, [&](int64_t begin, int64_t end) {
    ScratchArena scratch = ScratchArena::of_floats(kernel.backward_scratch(size));
    for (int64_t task = begin; task < end; ++task)
      kernel.backward(g, task / size.heads, task % size.heads, scratch.floats());
  });
  return {dq.to(q_in.scalar_type()), dk.to(k_in.scalar_type()), dv.to(v_in.scalar_type())};
}

}  // namespace
}  // namespace zs3fast::attention_to_mask

TORCH_LIBRARY_IMPL(zs3fast_cpp, CPU, m) {
  m.impl("attention_to_mask", zs3fast::attention_to_mask::forward);
  m.impl("attention_to_mask_by", zs3fast::attention_to_mask::by_name);
  m.impl("attention_to_mask_backward", zs3fast::attention_to_mask::backward);
}
