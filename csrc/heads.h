// What the attentions' bindings share: [B, heads, tokens, dh] as the kernels read and write it.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>

namespace zs3fast {

// fp32 (half types are computed in fp32) whose columns are neighbours, in whole multiples of `pad` of them: zeros behind.
inline at::Tensor rows_of(const at::Tensor& x, int64_t pad = 1) {
  auto wide = x.to(at::kFloat);
  const int64_t missing = (pad - wide.size(3) % pad) % pad;
  if (missing != 0) wide = at::constant_pad_nd(wide, {0, missing});  // keeps the memory format: columns may lie apart
  return wide.size(3) == 1 || wide.stride(3) == 1 ? wide : wide.contiguous();
}

// The same in a type that the kernel reads as it is, without padding.
inline at::Tensor rows_in(const at::Tensor& x, at::ScalarType type) {
  const auto y = x.to(type);
  return y.size(3) == 1 || y.stride(3) == 1 ? y : y.contiguous();
}

// [B, heads, rows, dh] lying in memory as [B, rows, heads, dh]: what the next linear layer reads without a copy.
inline at::Tensor empty_heads(const at::Tensor& like, int64_t dh) {
  return at::empty({like.size(0), like.size(2), like.size(1), dh}, like.options()).transpose(1, 2);
}
inline at::Tensor empty_heads(const at::Tensor& like) { return empty_heads(like, like.size(3)); }

}  // namespace zs3fast
