// The kernel of cuda_wgmma_kernel.h, for each type and head width. For sm_90a alone.
#include "cuda/wgmma_start.h"
#include "proposal_attention/cuda.h"
#include "proposal_attention/cuda_wgmma_kernel.h"

namespace zs3fast::proposal_attention {
namespace {

template <class T, int kDh>
__global__ __launch_bounds__(32 * wgmma::Shape<kDh>::kWarps, 1) void proposal_attention_wgmma_fwd_kernel(
    const __grid_constant__ Problem<T> p, const __grid_constant__ wgmma::Map k, const __grid_constant__ wgmma::Map v) {
  wgmma::Block block(wgmma::shared_memory());
  attend<T, kDh>(block, p, k, v, static_cast<int>(blockIdx.x));
}

template <class T, int kDh>
cudaError_t start(const Problem<T>& p, cudaStream_t stream) {
  using S = wgmma::Shape<kDh>;
  return wgmma::start<kDh>(proposal_attention_wgmma_fwd_kernel<T, kDh>, p, p.patches,
                           p.images * p.heads * hopper_blocks(p, S::kRows), S::kShared, stream);
}

}  // namespace

template <class T>
cudaError_t forward_wgmma(const Problem<T>& problem, int dh, cudaStream_t stream) {
  return cuda::with_one_of<64, 128>(dh, [&](auto width) { return start<T, width>(problem, stream); });
}

template cudaError_t forward_wgmma(const Problem<cuda::Half>&, int, cudaStream_t);
template cudaError_t forward_wgmma(const Problem<cuda::BFloat16>&, int, cudaStream_t);

}  // namespace zs3fast::proposal_attention
