// Attention of many rows over the same keys on a Hopper GPU: the dense heart of the attention kernels.
//
// A block is kGroups warpgroups of 64 rows. Tiles of keys and of values come by the copy engine, kStages of each in
// shared memory: the first warp asks for the next one where all groups are done with what lay there, while products
// of its own group run. A group multiplies its rows of q, in registers, with a tile of keys where that lies; and
// while the probabilities of one tile are multiplied with its values, it takes the exponents of the next. A warp
// that does nothing but copy would cost the others registers: nine warps are three on one of the four parts of a
// multiprocessor, which leaves 168 registers a thread. Sums and softmax are fp32, as in the mma.sync kernels.
//
// Not yet run on a GPU: tests run this very body by wgmma_emulated.h, and look at what it was compiled to.
#pragma once

#include "cuda/mma_attention.h"
#include "cuda/wgmma.h"

namespace zs3fast::wgmma {

using mma::Rows;

template <int kDh>
struct Shape {
  static constexpr int kGroups = 2, kRows = kGroups * kGroupRows;
  static constexpr int kKeys = kDh > 64 ? 64 : 128;  // of a tile
  static constexpr int kStages = 3;
  static constexpr int kWarps = kGroups * kGroupWarps;
  static constexpr int kPart = kKeys * kLine, kParts = kDh * 2 / kLine;  // a tile: parts of 64 columns
  static constexpr int kTile = kPart * kParts;
  static constexpr int kBarriers = 2 * kStages * kTile;        // where they lie, 8 bytes each, behind the tiles
  static constexpr int kShared = kBarriers + 4 * kStages * 8;  // bytes
  static_assert(kDh % 64 == 0 && kPart % kAtom == 0 && kShared + kAtom <= 227 * 1024);

  // Of keys (0) or values (1).
  ZS3FAST_HD static constexpr int tile(int which, int stage) { return (which * kStages + stage) * kTile; }
  ZS3FAST_HD static constexpr int full(int which, int stage) { return kBarriers + (which * kStages + stage) * 8; }
  ZS3FAST_HD static constexpr int empty(int which, int stage) { return full(which, stage) + 2 * kStages * 8; }
};

// Rows [first, first + Shape::kRows) of one head, as far as there are so many.
template <class T>
struct DenseRows {
  int image, head, first, rows, keys;
  Rows<const T> q;
  Rows<const T> k_own, v_own;  // where a row's softmax may start
  float scale;
  Rows<T> output;
  float* lse;
};

// Tiles of keys and values of one head, by the warp that asks for them.
template <int kDh>
struct Tiles {
  using S = Shape<kDh>;
  const Map &k, &v;
  int image, head, steps;

  // Of keys (0) or values (1), if there are so many; where the one that lay there before is done with.
  ZS3FAST_BODY void copy(Block& block, int which, int step) const {
    if (step >= steps) return;
    const int stage = step % S::kStages;
    block.wait(S::empty(which, stage), step / S::kStages % 2 ^ 1);  // at first: the phase before the first is over
    block.expect(S::full(which, stage), S::kTile);
    ZS3FAST_UNROLL
    for (int part = 0; part < S::kParts; ++part)
      block.copy(S::tile(which, stage) + part * S::kPart, which == 0 ? k : v, S::full(which, stage), 64 * part,
                 step * S::kKeys, head, image);
  }
};

// What rows see: all keys there are.
template <int kDh>
struct AllKeys {
  int keys;

  // Asks for what `apply` needs for the lane's two rows and keys [key, key + kKeys), while products run.
  ZS3FAST_BODY void fetch(const Lanes<int> (&)[2], int) {}
  // Scores of keys that are not seen become -inf.
  ZS3FAST_BODY void apply(Lanes<float> (&scores)[Shape<kDh>::kKeys / 8][4], int key) {
    if (key + Shape<kDh>::kKeys > keys) mma::cut_off(scores, key, keys);
  }
};

// own(row): which key and value of k_own and v_own the softmax of a row starts at, negative: none. Every row has one,
// or some key that it sees. seen: AllKeys, or a class with its two functions.
template <class T, int kDh, class Own, class Seen>
ZS3FAST_BODY void attend_group(Block& block, const DenseRows<T>& tile, const Tiles<kDh>& tiles, Own own, Seen seen) {
  using S = Shape<kDh>;
  constexpr int kTiles = kDh / 8, kKeyTiles = S::kKeys / 8;
  const int steps = tiles.steps;
  const Lanes<int> group = mma::lane_index() / 4;
  const Lanes<int> row[2] = {group + (tile.first + 16 * block.warp), group + (tile.first + 16 * block.warp + 8)};
  const Lanes<bool> inside[2] = {row[0] < tile.rows, row[1] < tile.rows};
  const float scale = tile.scale * mma::kLog2e;

  Lanes<uint32_t> left[kDh / 16][4];
  mma::load_rows<kDh>(left, tile.q, row, inside);
  mma::Softmax<kTiles> softmax;
  ZS3FAST_UNROLL
  for (int half = 0; half < 2; ++half)
    mma::start_at_own<T>(softmax, half, left, tile.k_own, tile.v_own, own(row[half]), scale);

  Lanes<float> scores[kKeyTiles][4], shrink[2];
  Lanes<uint32_t> probabilities[S::kKeys / 16][4];
  const auto start_scores = [&](int stage, int phase) {
    block.wait(S::full(0, stage), phase);
    block.fence(scores, left);
    ZS3FAST_UNROLL
    for (int s = 0; s < kDh / 16; ++s)  // 16 columns are 32 bytes of a line
      block.template multiply<T, false>(
          scores, left[s], block.operand(S::tile(0, stage) + s / 4 * S::kPart + s % 4 * 32, 0, kAtom), s > 0);
    block.commit();
  };
  const auto start_sums = [&](int stage, int phase) {
    block.wait(S::full(1, stage), phase);
    block.fence(softmax.sums, probabilities);
    ZS3FAST_UNROLL
    for (int s = 0; s < S::kKeys / 16; ++s)  // 16 keys are 16 lines
      block.template multiply<T, true>(softmax.sums, probabilities[s],
                                       block.operand(S::tile(1, stage) + 16 * s * kLine, S::kPart, kAtom), true);
    block.commit();
  };
  const auto weigh = [&](int step) {
    ZS3FAST_UNROLL
    for (int i = 0; i < 4 * kKeyTiles; ++i) scores[i / 4][i % 4] = scores[i / 4][i % 4] * scale;
    seen.apply(scores, step * S::kKeys);
    softmax.weigh(scores, shrink);
  };
  const auto take = [&] {
    softmax.scale_sums(shrink);
    ZS3FAST_UNROLL
    for (int s = 0; s < S::kKeys / 16; ++s) mma::as_operand<T>(probabilities[s], scores[2 * s], scores[2 * s + 1]);
  };

  if (steps > 0) {
    start_scores(0, 0);
    seen.fetch(row, 0);
    block.template finish<0>(scores);
    block.arrive(S::empty(0, 0));
    weigh(0);
    take();
    int stage = 0, phase = 0;  // of the values to be multiplied next
    ZS3FAST_ONE_BY_ONE
    for (int step = 1; step < steps; ++step) {
      const int next = stage + 1 == S::kStages ? 0 : stage + 1, next_phase = next == 0 ? phase ^ 1 : phase;
      start_scores(next, next_phase);
      start_sums(stage, phase);
      seen.fetch(row, step * S::kKeys);
      if (block.warp == 0) {
        tiles.copy(block, 0, step - 1 + S::kStages);
        if (step > 1) tiles.copy(block, 1, step - 2 + S::kStages);
      }
      block.template finish<1>(scores);
      block.arrive(S::empty(0, next));
      weigh(step);
      block.template finish<0>(softmax.sums);
      block.arrive(S::empty(1, stage));
      take();
      stage = next, phase = next_phase;
    }
    start_sums(stage, phase);
    block.template finish<0>(softmax.sums);
  }
  mma::write_rows<T>(softmax, tile.output, tile.lse, row, inside);
}

template <class T, int kDh, class Own, class Seen>
ZS3FAST_BODY void dense_rows(Block& block, const DenseRows<T>& tile, const Map& k, const Map& v, Own own, Seen seen) {
  using S = Shape<kDh>;
  if (block.warp == 0) {
    ZS3FAST_UNROLL
    for (int i = 0; i < 2 * S::kStages; ++i) {
      block.start(S::full(i % 2, i / 2), 1);
      block.start(S::empty(i % 2, i / 2), S::kGroups * kGroupWarps);
    }
    block.publish();
  }
  block.sync();
  const Tiles<kDh> tiles{k, v, tile.image, tile.head, cuda::ceil_div(tile.keys, S::kKeys)};
  if (block.warp == 0)
    for (int i = 0; i < 2 * S::kStages; ++i) tiles.copy(block, i % 2, i / 2);
  attend_group<T, kDh>(block, tile, tiles, own, seen);
}

}  // namespace zs3fast::wgmma
