// What the bindings of the tensor-core kernels share (csrc/<op>/cuda_binding.cpp).
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <tuple>

#include "cuda/launch.h"
#include "cuda/mma_rows.h"

namespace zs3fast::mma {

// A tensor that is only read, [B, heads, tokens, dh], in vectors of 16 bytes.
template <class T>
Heads<const T> heads_of(const char* op, const char* name, const at::Tensor& x) {
  const int64_t vector = 16 / sizeof(T);
  bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 && x.stride(3) == 1;
  for (int axis = 0; axis < 3; ++axis) aligned = aligned && (x.size(axis) <= 1 || x.stride(axis) % vector == 0);
  TORCH_CHECK(x.numel() == 0 || aligned, op, ": ", name,
              " must have neighbouring columns and rows at multiples of 16 bytes, got strides ", x.strides());
  return {static_cast<const T*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

template <class T>
Heads<T> output_heads_of(at::Tensor& x) {
  return {static_cast<T*>(x.mutable_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

// [B, heads, tokens, dh] lying in memory as [B, tokens, heads, dh]: what the next linear layer reads without a copy.
inline at::Tensor empty_heads(const at::Tensor& like) {
  return at::empty({like.size(0), like.size(2), like.size(1), like.size(3)}, like.options()).transpose(1, 2);
}

// call(T{}) with the type of x's elements.
template <class Call>
void with_half_type(const char* op, const at::Tensor& x, Call call) {
  TORCH_CHECK(x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16, op,
              ": expected float16 or bfloat16, got ", x.scalar_type());
  if (x.scalar_type() == at::kHalf)
    call(cuda::Half{});
  else
    call(cuda::BFloat16{});
}

// As an int of the kernel's.
inline int int_of(const char* op, int64_t n) {
  TORCH_CHECK(n <= INT32_MAX, op, ": too large for one launch: ", n);
  return static_cast<int>(n);
}

// Output, shaped like q, and log-sum-exp of attention. problem(T{}, output, lse) is the request in elements of type T;
// forward(request, dh, stream) of its namespace starts it, or forward_wgmma.
template <bool kWgmma, class MakeProblem>
std::tuple<at::Tensor, at::Tensor> attention(const char* op, const at::Tensor& q, MakeProblem problem) {
  const cuda::Device device(q);
  auto output = empty_heads(q);
  auto lse = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
  with_half_type(op, q, [&](auto type) {
    const auto request = problem(type, output_heads_of<decltype(type)>(output), lse.mutable_data_ptr<float>());
    if (int_of(op, request.blocks()) == 0) return;
    const int dh = int_of(op, q.size(3));
    if constexpr (kWgmma)
      ZS3FAST_LAUNCH(forward_wgmma(request, dh, device.stream()));
    else
      ZS3FAST_LAUNCH(forward(request, dh, device.stream()));
  });
  return {output, lse};
}

}  // namespace zs3fast::mma
