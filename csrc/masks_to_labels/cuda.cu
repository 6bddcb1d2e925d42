// The kernels of cuda_kernel.h.
#include "masks_to_labels/cuda.h"

#include "cuda/start.h"

namespace zs3fast::masks_to_labels {
namespace {

template <bool kStaged>
__global__ __launch_bounds__(kThreads) void masks_to_labels_kernel(const __grid_constant__ CudaRequest q) {
  extern __shared__ __align__(16) unsigned char shared[];
  gpu::one_window<kStaged>(cuda::GpuBlock(), q, shared);
}

}  // namespace

cudaError_t one_window(const CudaRequest& q, cudaStream_t stream) {
  const dim3 grid(cuda::ceil_div(q.width, kThreads), (q.masks.rows.points + 1) * q.chunks, q.images);
  const auto kernel = q.span ? masks_to_labels_kernel<true> : masks_to_labels_kernel<false>;
  return cuda::start(kernel, grid, kThreads, gpu::shared_bytes(q), stream, q);
}

}  // namespace zs3fast::masks_to_labels
