// The body of the Hopper kernel run by the emulation, for tests: blocks of regions, then those of rows.
#include "emulated/region_bridge_attention.h"
#include "region_bridge_attention/cuda_wgmma_kernel.h"

namespace {

using namespace zs3fast;

template <class T, int kDh>
void run(const Entry& entry, const int64_t* sizes, float scale) {
  using S = wgmma::Shape<kDh>;
  const auto p = bridge_problem<T>(entry, sizes, scale);
  const auto map = [&](const mma::Heads<const T>& x) {
    return map_of(x, p.images, p.heads, p.keys(), kDh, S::kKeys);
  };
  const wgmma::Map k = map(p.k), v = map(p.v);
  for (int program = 0; program < p.images * p.heads * p.region_blocks(); ++program)
    mma::Launch(S::kWarps, region_bridge_attention::kHopperShared<kDh>, [&](mma::Block& block) {
      region_bridge_attention::attend_regions<T, kDh, S::kWarps>(
          block, p, program / p.region_blocks(), program % p.region_blocks() * region_bridge_attention::kRegions);
    }).run();
  for (int program = 0; program < p.images * p.heads * region_bridge_attention::hopper_row_blocks(p, S::kRows);
       ++program)
    wgmma::Launch(S::kWarps, region_bridge_attention::kHopperShared<kDh>, [&](wgmma::Block& block) {
      region_bridge_attention::attend_rows<T, kDh>(block, p, k, v, program);
    }).run();
}

}  // namespace

// Tensors: q, k, v, output, lse. Sizes: B, heads, prefix_q, prefix_k, h, w, rh, rw.
ZS3FAST_WIDE_ENTRY(region_bridge_attention_wgmma)
