// proposal_attention on Hopper: 128 proposals of a head a block, as dense rows of cuda/wgmma_attention.h over all
// patches. Bits are applied to the scores; no tile is left out, since some proposal of 128 keeps some patch of
// almost every 128.
//
// Not yet run on a GPU. It reads keys and values once for 128 proposals where cuda_kernel.h reads them once for 16,
// but has an eighth of its blocks. Predicted for an H100 (heads = 12, dh = 64, Nq = 100, N = 900, 16-bit types): at
// B = 1 12 blocks of 8 tiles, 1024 cycles each at least, 5 to 8 us, no less than cuda_kernel.h's 4 to 6; at B = 16
// 192 blocks, 10 to 16 us, where that needs 300 MB out of the L2 cache, 55 us, if masks are dense. So it is for
// many images at a time.
#pragma once

#include "cuda/wgmma_attention.h"
#include "proposal_attention/cuda_problem.h"

namespace zs3fast::proposal_attention {

using mma::Lanes;

// The patches that a row keeps, as class Seen of cuda/wgmma_attention.h.
template <int kDh>
struct Kept {
  static constexpr int kKeys = wgmma::Shape<kDh>::kKeys, kWords = kKeys / 32;
  const uint32_t* bits;  // of the image
  int64_t bits_row, bits_word;
  int proposals, patches;
  Lanes<uint32_t> words[2][kWords];

  ZS3FAST_BODY void fetch(const Lanes<int> (&row)[2], int key) {
    ZS3FAST_UNROLL
    for (int i = 0; i < 2 * kWords; ++i) {
      const int patch = key + 32 * (i / 2);
      Lanes<uint32_t> word[1];
      mma::load<1>(word, bits, mma::cast<int64_t>(row[i % 2]) * bits_row + patch / 32 * bits_word,
                   (row[i % 2] < proposals) & Lanes<bool>(patch < patches));
      words[i % 2][i / 2] = word[0];
    }
  }
  ZS3FAST_BODY void apply(Lanes<float> (&scores)[kKeys / 8][4], int key) {
    const Lanes<int> place = mma::lane_index() % 4;
    ZS3FAST_UNROLL
    for (int i = 0; i < kKeys / 2; ++i) {
      const int n = i / 4, column = 8 * (n % 4) + i % 2;  // in a word, less 2 place
      const Lanes<uint32_t> bit = words[i % 4 / 2][n / 4] >> mma::cast<uint32_t>(2 * place) & (1u << column);
      scores[n][i % 4] = mma::select(bit != 0u, scores[n][i % 4], mma::kMinusInfinity);
    }
    if (key + kKeys > patches) mma::cut_off(scores, key, patches);  // bits behind the last patch are ignored
  }
};

template <class T>
ZS3FAST_HD int hopper_blocks(const Problem<T>& p, int rows_of_block) {  // of a head
  return cuda::ceil_div(p.proposals, rows_of_block);
}

// Block `program`, whose keys and values are those of the maps.
template <class T, int kDh>
ZS3FAST_BODY void attend(wgmma::Block& block, const Problem<T>& p, const wgmma::Map& k, const wgmma::Map& v,
                         int program) {
  const int blocks = hopper_blocks(p, wgmma::Shape<kDh>::kRows), head = program / blocks;
  const int b = head / p.heads, a = head % p.heads, proposals = p.proposals;
  const wgmma::DenseRows<T> tile{b,
                                 a,
                                 program % blocks * wgmma::Shape<kDh>::kRows,
                                 proposals,
                                 p.patches,
                                 p.q.of(b, a),
                                 p.k_self.of(b, a),
                                 p.v_self.of(b, a),
                                 p.scale,
                                 p.output.of(b, a),
                                 p.lse + int64_t{head} * proposals};
  wgmma::dense_rows<T, kDh>(
      block, tile, k, v, [&](Lanes<int> row) { return mma::select(row < proposals, row, -1); },
      Kept<kDh>{p.bits + b * p.bits_image, p.bits_row, p.bits_word, proposals, p.patches, {}});
}

}  // namespace zs3fast::proposal_attention
