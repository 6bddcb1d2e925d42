// proposal_attention on tensor cores: the body of the kernel, on raw pointers and strides. No torch header here.
//
// A block is 16 proposals of one head; its 6 warps (at dh = 64) share the patches out and add up their softmaxes at the
// end (cuda/mma_attention.h). Warp 0 starts at the token itself, so a proposal that keeps nothing needs no case.
//
// Not yet run on a GPU. Predicted for an H100 (B = 1, heads = 12, dh = 64, Nq = 100, N = 900, 16-bit types):
//   products   4 heads dh Nq N = 276 MFLOP if every patch is kept, tiles of 16 x 32 make it 319: 0.5 us at the 600
//              TFLOP/s that mma.sync reaches there
//   memory     heads dh (4 Nq + 2 N) 2 + 4 Nq N / 32 + 4 heads Nq bytes = 3.4 MB: 1.0 us at 3.35 TB/s; 7 blocks a head
//              read the same keys, 19 MB out of the L2 cache: 2 to 3 us
//   latency    84 blocks on 132 multiprocessors are all there is, one wave. A warp takes 5 of 29 key blocks one after
//              the other, each a read of keys and values (0.6 us from memory, 0.3 from L2), and the merge: 2 to 4 us
// so 4 to 6 us with the launch, bound by latency; at 10 % kept and scattered the same, in compact masks half of it.
#pragma once

#include "cuda/mma_attention.h"
#include "proposal_attention/cuda_problem.h"

namespace zs3fast::proposal_attention {

using mma::Lanes;

// Block `program` of p.blocks().
template <class T, int kDh>
ZS3FAST_BODY void attend(mma::Block& block, const Problem<T>& p, int program) {
  const int tiles = p.tiles(), head = program / tiles, b = head / p.heads, a = head % p.heads;
  const int first = program % tiles * kRows;
  const int rows = p.proposals - first < kRows ? p.proposals - first : kRows;
  const mma::MaskedRows<T> tile{rows,
                                p.q.of(b, a).from(first),
                                p.k_self.of(b, a).from(first),
                                p.v_self.of(b, a).from(first),
                                0,
                                p.patches,
                                p.patches,
                                p.k.of(b, a),
                                p.v.of(b, a),
                                p.scale,
                                p.output.of(b, a).from(first),
                                p.lse + int64_t{head} * p.proposals + first};

  const uint32_t* bits = p.bits + b * p.bits_image + first * p.bits_row;
  const Lanes<int> row = mma::lane_index() % kRows;
  const Lanes<int64_t> start = mma::cast<int64_t>(row) * p.bits_row;
  mma::masked_rows<T, kDh, kWarps<kDh>>(block, tile, [&](int patch) {
    Lanes<uint32_t> word[1];
    mma::load<1>(word, bits, start + patch / 32 * p.bits_word, (row < rows) & Lanes<bool>(patch < p.patches));
    const int left = p.patches - patch;  // bits behind the last patch are ignored
    return left >= 32 || left <= 0 ? word[0] : word[0] & ((1u << left) - 1);
  });
}

}  // namespace zs3fast::proposal_attention
