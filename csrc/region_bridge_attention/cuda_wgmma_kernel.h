// region_bridge_attention on Hopper: as cuda_kernel.h, in which prefix and patch rows are dense rows of
// cuda/wgmma_attention.h, 128 a block. Region rows are the same code on the warps that such a block has.
//
// Not yet run on a GPU. Predicted for an H100 as in cuda_kernel.h (3.64 GFLOP at B = 1, dh = 64): 108 blocks of rows,
// one on a multiprocessor, of 9 tiles of 128 keys. A tile takes two warpgroups 1024 cycles of the tensor cores and 1024
// of exponents beside them: 5.3 us at 1.75 GHz, 7 to 9 with what does not overlap; 27 MB of tiles come out of the L2
// cache meanwhile. Larger batches, if it gets to 600 TFLOP/s: 6 us an image, by mma.sync 9.
#pragma once

#include "cuda/wgmma_attention.h"
#include "region_bridge_attention/cuda_kernel.h"

namespace zs3fast::region_bridge_attention {

template <int kDh>
constexpr int kHopperShared = mma::kMaskedRowsShared<kDh, wgmma::Shape<kDh>::kWarps> > wgmma::Shape<kDh>::kShared
                                  ? mma::kMaskedRowsShared<kDh, wgmma::Shape<kDh>::kWarps>
                                  : wgmma::Shape<kDh>::kShared;

template <class T>
ZS3FAST_HD int hopper_row_blocks(const Problem<T>& p, int rows_of_block) {  // of a head
  return cuda::ceil_div(p.rows(), rows_of_block);
}

// Block `program` of those of rows, whose keys and values are those of the maps: without regions.
template <class T, int kDh>
ZS3FAST_BODY void attend_rows(wgmma::Block& block, const Problem<T>& p, const wgmma::Map& k, const wgmma::Map& v,
                              int program) {
  const int blocks = hopper_row_blocks(p, wgmma::Shape<kDh>::kRows), head = program / blocks;
  const int b = head / p.heads, a = head % p.heads, keys = p.keys();
  const wgmma::DenseRows<T> tile{b,
                                 a,
                                 program % blocks * wgmma::Shape<kDh>::kRows,
                                 p.rows(),
                                 keys,
                                 p.q.of(b, a),
                                 p.k.of(b, a).from(keys),
                                 p.v.of(b, a).from(keys),
                                 p.scale,
                                 p.output.of(b, a),
                                 p.lse_of(head)};
  wgmma::dense_rows<T, kDh>(
      block, tile, k, v, [&](Lanes<int> row) { return region_of(p, row - p.prefix_q); }, wgmma::AllKeys<kDh>{keys});
}

}  // namespace zs3fast::region_bridge_attention
