// The kernels of cuda_kernel.h.
#include "mask_loss/cuda.h"

#include "cuda/start.h"

namespace zs3fast::mask_loss {
namespace {

constexpr int kMaxThreads = 32 * kMaxWarps;

template <bool kSquare>
__global__ __launch_bounds__(kMaxThreads) void mask_loss_fwd_kernel(const __grid_constant__ CudaProblem q,
                                                                    float* partial) {
  __shared__ gpu::Tile tile;
  gpu::forward<kSquare>(cuda::GpuBlock(), q, tile, partial);
}

__global__ __launch_bounds__(kSumThreads) void mask_loss_sum_kernel(const float* partial, float* sums, int64_t rows,
                                                                    int32_t classes) {
  __shared__ float shared[kSumThreads];
  gpu::add_rows(cuda::GpuBlock(), partial, sums, rows, classes, shared);
}

template <bool kSquare>
__global__ __launch_bounds__(kMaxThreads) void mask_loss_bwd_kernel(const __grid_constant__ CudaProblem q,
                                                                    const Gradients grad, float* corners) {
  __shared__ gpu::Tile tile;
  gpu::backward<kSquare>(cuda::GpuBlock(), q, grad, tile, corners);
}

__global__ __launch_bounds__(256) void mask_loss_gather_kernel(const __grid_constant__ CudaProblem q,
                                                               const float* corners, void* grad) {
  gpu::gather(cuda::GpuBlock(), q, corners, grad);
}

dim3 grid(const CudaProblem& q) { return dim3(q.strips * q.groups, q.tile_rows(), q.images); }

}  // namespace

cudaError_t start_forward(const CudaProblem& q, float* partial, float* sums, cudaStream_t stream) {
  const auto kernel = q.gamma == 2.0f ? mask_loss_fwd_kernel<true> : mask_loss_fwd_kernel<false>;
  const cudaError_t refused = cuda::start(kernel, grid(q), 32 * q.warps, 0, stream, q, partial);
  if (refused != cudaSuccess) return refused;
  const dim3 blocks(cuda::ceil_div(q.classes, 32), 4 * q.images);
  return cuda::start(mask_loss_sum_kernel, blocks, kSumThreads, 0, stream, partial, sums,
                     static_cast<int64_t>(q.tile_rows()) * q.strips, q.classes);
}

cudaError_t start_backward(const CudaProblem& q, const Gradients& grad, float* corners, void* out,
                           cudaStream_t stream) {
  const auto kernel = q.gamma == 2.0f ? mask_loss_bwd_kernel<true> : mask_loss_bwd_kernel<false>;
  const cudaError_t refused = cuda::start(kernel, grid(q), 32 * q.warps, 0, stream, q, grad, corners);
  if (refused != cudaSuccess) return refused;
  const int threads = gpu::gather_threads(q);
  const dim3 blocks(q.rows.points * q.columns.points, cuda::ceil_div(q.classes, threads), q.images);
  return cuda::start(mask_loss_gather_kernel, blocks, threads, 0, stream, q, corners, out);
}

}  // namespace zs3fast::mask_loss
