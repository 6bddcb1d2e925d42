// The kernels of cuda_kernel.h.
#include "masks_to_bits/cuda.h"

#include "cuda/start.h"

namespace zs3fast::masks_to_bits {
namespace {

template <class T, bool kLogits>
__global__ __launch_bounds__(kThreads) void masks_to_bits_kernel(const __grid_constant__ CudaRequest q) {
  gpu::make_words<T, kLogits>(cuda::GpuBlock(), q);
}

template <class T>
cudaError_t start(const CudaRequest& q, cudaStream_t stream) {
  const auto kernel = q.logits ? masks_to_bits_kernel<T, true> : masks_to_bits_kernel<T, false>;
  return cuda::start(kernel, dim3(gpu::blocks_x(q), gpu::blocks_y(q)), kThreads, 0, stream, q);
}

}  // namespace

cudaError_t run(const CudaRequest& q, cuda::Element element, cudaStream_t stream) {
  switch (element) {
    case cuda::Element::float32: return start<float>(q, stream);
    case cuda::Element::float16: return start<cuda::Half>(q, stream);
    default: return start<cuda::BFloat16>(q, stream);
  }
}

}  // namespace zs3fast::masks_to_bits
