// What the binding of a CUDA kernel (csrc/<op>/cuda_binding.cpp) needs of torch. The kernels themselves, and the
// functions that start them, are in csrc/<op>/cuda.cu and know no torch:
//
//   cuda::Device device(x);                                        // x's device is current from here on
//   auto out = at::empty(...);                                     // the one way to allocate: graphs can capture it
//   ZS3FAST_LAUNCH(forward(request, device.stream()));             // returns cudaError_t, see cuda/start.h
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/element.h"

namespace zs3fast::cuda {

// Makes a tensor's device the current one as long as this lives.
class Device {
 public:
  explicit Device(const at::Tensor& x) : guard_(x.device()) {}
  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream(guard_.current_device().index()); }

 private:
  c10::cuda::CUDAGuard guard_;
};

// A launch that was refused is a RuntimeError, one that failed on the device shows at the next synchronisation.
#define ZS3FAST_LAUNCH(call) C10_CUDA_CHECK(call)

inline Element element_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Element::float32;
    case at::kHalf: return Element::float16;
    case at::kBFloat16: return Element::bfloat16;
    default: TORCH_CHECK(false, "expected float32, float16 or bfloat16, got ", x.scalar_type());
  }
}

}  // namespace zs3fast::cuda
