// The kernel of cuda_kernel.h, for each type and head width.
#include "proposal_attention/cuda.h"

#include "cuda/start.h"
#include "proposal_attention/cuda_kernel.h"

namespace zs3fast::proposal_attention {
namespace {

template <class T, int kDh>
__global__ __launch_bounds__(32 * kWarps<kDh>, 2) void
proposal_attention_fwd_kernel(const __grid_constant__ Problem<T> problem) {
  __shared__ __align__(16) unsigned char shared[mma::kMaskedRowsShared<kDh, kWarps<kDh>>];
  mma::Block block(shared);
  attend<T, kDh>(block, problem, blockIdx.x);
}

template <class T, int kDh>
cudaError_t start(const Problem<T>& problem, cudaStream_t stream) {
  return cuda::start(proposal_attention_fwd_kernel<T, kDh>, dim3(problem.blocks()), 32 * kWarps<kDh>, 0, stream,
                     problem);
}

}  // namespace

template <class T>
cudaError_t forward(const Problem<T>& problem, int dh, cudaStream_t stream) {
  return cuda::with_one_of<32, 64, 128>(dh, [&](auto width) { return start<T, width>(problem, stream); });
}

template cudaError_t forward(const Problem<cuda::Half>&, int, cudaStream_t);
template cudaError_t forward(const Problem<cuda::BFloat16>&, int, cudaStream_t);

}  // namespace zs3fast::proposal_attention
