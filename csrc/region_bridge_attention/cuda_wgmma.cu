// The kernel of cuda_wgmma_kernel.h, for each type and head width. For sm_90a alone.
#include "cuda/wgmma_start.h"
#include "region_bridge_attention/cuda.h"
#include "region_bridge_attention/cuda_wgmma_kernel.h"

namespace zs3fast::region_bridge_attention {
namespace {

template <class T, int kDh>
__global__ __launch_bounds__(32 * wgmma::Shape<kDh>::kWarps, 1) void region_bridge_attention_wgmma_fwd_kernel(
    const __grid_constant__ Problem<T> p, const __grid_constant__ wgmma::Map k, const __grid_constant__ wgmma::Map v) {
  unsigned char* shared = wgmma::shared_memory();
  const int program = static_cast<int>(blockIdx.x), region_programs = p.images * p.heads * p.region_blocks();
  if (program < region_programs) {
    mma::Block block(shared);
    attend_regions<T, kDh, wgmma::Shape<kDh>::kWarps>(block, p, program / p.region_blocks(),
                                                      program % p.region_blocks() * kRegions);
  } else {
    wgmma::Block block(shared);
    attend_rows<T, kDh>(block, p, k, v, program - region_programs);
  }
}

template <class T, int kDh>
cudaError_t start(const Problem<T>& p, cudaStream_t stream) {
  const int blocks = p.images * p.heads * (p.region_blocks() + hopper_row_blocks(p, wgmma::Shape<kDh>::kRows));
  return wgmma::start<kDh>(region_bridge_attention_wgmma_fwd_kernel<T, kDh>, p, p.keys(), blocks, kHopperShared<kDh>,
                           stream);
}

}  // namespace

template <class T>
cudaError_t forward_wgmma(const Problem<T>& problem, int dh, cudaStream_t stream) {
  return cuda::with_one_of<64, 128>(dh, [&](auto width) { return start<T, width>(problem, stream); });
}

template cudaError_t forward_wgmma(const Problem<cuda::Half>&, int, cudaStream_t);
template cudaError_t forward_wgmma(const Problem<cuda::BFloat16>&, int, cudaStream_t);

}  // namespace zs3fast::region_bridge_attention
