// How a .cu file starts a kernel: on a stream, with any amount of shared memory, and told at once if it cannot be.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace zs3fast::cuda {

constexpr int64_t kSharedByDefault = 48 * 1024;  // bytes; a kernel asks for more

// Allocates nothing and waits for nothing, so it can be captured in a graph. The error is that of this launch.
template <class... Parameters, class... Arguments>
cudaError_t start(void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared_bytes, cudaStream_t stream,
                  Arguments... arguments) {
  if (shared_bytes > kSharedByDefault) {
    const cudaError_t refused = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                     static_cast<int>(shared_bytes));
    if (refused != cudaSuccess) return refused;
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace zs3fast::cuda
