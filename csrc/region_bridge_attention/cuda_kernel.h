// region_bridge_attention on tensor cores: the body of the kernel, on raw pointers and strides. No torch header here.
//
// One launch of two kinds of blocks of 4 warps:
//   regions  16 region rows over the patches of their windows and themselves: masked rows whose bits are worked out
//            from where patches lie (cuda/mma_attention.h). The windows of 16 regions in a row lie in a band of the
//            grid, so a block looks at few keys if there are many regions, and at all of them if there are few.
//   rows     64 prefix and patch rows, 16 a warp, over all prefix and patch keys: keys and values come through shared
//            memory, the next 64 while these are worked on. A patch's region token is where its softmax starts.
// Region blocks come first: with one region they last as long as the others.
//
// Not yet run on a GPU. Predicted for an H100 (B = 1, heads = 12, dh = 64, N = 1024, P = 11, 16-bit types):
//   products   4 heads dh (P + N)^2 = 3.29 GFLOP, 64 x 64 tiles make it 3.64; the region rows 0.05 at M = 16, 0.10 at
//              M = 1024 (dense: 0.1 and 9.7). 9 us at the 400 TFLOP/s that mma.sync attention reaches there
//   exponents  heads (P + N)^2 = 12.9 M of them at 16 a clock and multiprocessor: 3.5 us, beside the products
//   memory     heads dh (4 (P + N) + 4 M) 2 bytes = 6.5 MB and 12.7 MB: 2 to 4 us, beside the products
// 204 blocks of rows on 132 multiprocessors that hold 3 each: one wave, the busiest with two. So 10 to 14 us; larger
// batches 9 us an image.
#pragma once

#include "cuda/mma_attention.h"
#include "region_bridge_attention/cuda_problem.h"

namespace zs3fast::region_bridge_attention {

using mma::Lanes;
using mma::Rows;

template <int kDh>
constexpr int kKeys = kDh > 64 ? 32 : 64;  // keys of a step; two steps of keys and values are in shared memory
template <int kDh>
constexpr int kTileBytes = kKeys<kDh> * kDh * 2;
template <int kDh>
constexpr int kShared = mma::kMaskedRowsShared<kDh, kWarps> > 4 * kTileBytes<kDh>
                            ? mma::kMaskedRowsShared<kDh, kWarps>
                            : 4 * kTileBytes<kDh>;

// A patch's region, -1 in the margin and outside of the grid.
template <class T>
ZS3FAST_BODY Lanes<int> region_of(const Problem<T>& p, Lanes<int> patch) {
  const Lanes<int> y = patch / p.w / (p.h / p.rh), x = patch % p.w / (p.w / p.rw);
  return mma::select((patch >= 0) & (patch < p.patches()) & (y < p.rh) & (x < p.rw), y * p.rw + x, -1);
}

template <class T, int kDh, int kWarps>
ZS3FAST_BODY void attend_regions(mma::Block& block, const Problem<T>& p, int head, int first) {
  const int b = head / p.heads, a = head % p.heads;
  const int end = p.regions() - first < kRegions ? p.regions() : first + kRegions;
  const Rows<const T> q = p.q.of(b, a), k = p.k.of(b, a), v = p.v.of(b, a);
  const int band = p.h / p.rh * p.w;  // patches of a row of regions
  const mma::MaskedRows<T> tile{end - first,
                                q.from(p.rows() + first),
                                k.from(p.keys() + first),
                                v.from(p.keys() + first),
                                first / p.rw * band,
                                ((end - 1) / p.rw + 1) * band,
                                p.patches(),
                                k.from(p.prefix_k),
                                v.from(p.prefix_k),
                                p.scale,
                                p.output.of(b, a).from(p.rows() + first),
                                p.lse_of(head) + p.rows() + first};
  const Lanes<int> lane = mma::lane_index();
  mma::masked_rows<T, kDh, kWarps>(block, tile, [&](int patch) {
    const Lanes<int> region = region_of(p, lane + patch);
    Lanes<uint32_t> word = 0u;
    if (patch < tile.end)
      ZS3FAST_UNROLL
      for (int row = 0; row < kRegions; ++row)
        word = mma::select(lane % kRegions == row, Lanes<uint32_t>(mma::ballot(region == first + row)), word);
    return word;
  });
}

// Where 16 bytes, `chunk` of a key's row, lie in a tile: a matrix load reads a chunk of 8 neighbouring rows, and these
// lie in different banks.
template <int kDh>
ZS3FAST_BODY Lanes<int> swizzled(Lanes<int> row, Lanes<int> chunk) {
  const Lanes<int> turn = kDh == 32 ? row / 2 % 4 : row % 8;
  return row * (2 * kDh) + (chunk ^ turn) * 16;
}

template <class T, int kDh>
ZS3FAST_BODY void copy_tile(mma::Block& block, int to, const Rows<const T>& from, int first, int keys) {
  constexpr int kChunks = kDh / 8;
  ZS3FAST_UNROLL
  for (int i = 0; i < kKeys<kDh> * kChunks / (32 * kWarps); ++i) {
    const Lanes<int> index = mma::lane_index() + 32 * (block.warp + kWarps * i);
    const Lanes<int> row = index / kChunks, chunk = index % kChunks;
    block.copy_async(swizzled<kDh>(row, chunk) + to, from.data, mma::address(from, row + first, chunk * 8),
                     row < keys - first);
  }
}

template <class T, int kDh>
ZS3FAST_BODY void attend_rows(mma::Block& block, const Problem<T>& p, int head, int first) {
  constexpr int kTile = kTileBytes<kDh>, kStep = kKeys<kDh>, kTiles = kDh / 8;
  const int b = head / p.heads, a = head % p.heads, rows = p.rows(), keys = p.keys();
  const Rows<const T> q = p.q.of(b, a), k = p.k.of(b, a), v = p.v.of(b, a);
  const auto fetch = [&](int key, int stage) {
    if (key < keys) {
      copy_tile<T, kDh>(block, 2 * stage * kTile, k, key, keys);
      copy_tile<T, kDh>(block, (2 * stage + 1) * kTile, v, key, keys);
    }
    block.close_group();
  };
  fetch(0, 0);

  const Lanes<int> lane = mma::lane_index(), group = lane / 4;
  const Lanes<int> row[2] = {group + (first + 16 * block.warp), group + (first + 16 * block.warp + 8)};
  const Lanes<bool> inside[2] = {row[0] < rows, row[1] < rows};
  const float scale = p.scale * mma::kLog2e;
  Lanes<uint32_t> left[kDh / 16][4];
  mma::load_rows<kDh>(left, q, row, inside);
  mma::Softmax<kTiles> softmax;
  ZS3FAST_UNROLL
  for (int half = 0; half < 2; ++half)
    mma::start_at_own<T>(softmax, half, left, k.from(keys), v.from(keys), region_of(p, row[half] - p.prefix_q), scale);

  const Lanes<int> matrix = lane / 8, line = lane % 8;
  for (int key = 0, stage = 0; key < keys; key += kStep, stage ^= 1) {
    block.template wait_for_groups<0>();
    block.sync();  // this step's tiles are there, and no warp reads the other stage's any more
    fetch(key + kStep, stage ^ 1);
    const int k_tile = 2 * stage * kTile, v_tile = k_tile + kTile;

    Lanes<float> scores[kStep / 8][4];
    ZS3FAST_UNROLL
    for (int n = 0; n < kStep / 8; n += 2) {
      ZS3FAST_UNROLL
      for (int i = 0; i < 8; ++i) scores[n + i / 4][i % 4] = 0.0f;
      ZS3FAST_UNROLL
      for (int s = 0; s < kDh / 16; ++s) {
        Lanes<uint32_t> right[4];  // keys 8 n and on, both halves of 16 columns; the same of 8 keys more
        block.template load_matrices<false>(
            right, swizzled<kDh>(line + matrix / 2 * 8 + 8 * n, matrix % 2 + 2 * s) + k_tile);
        mma::multiply_add<T>(scores[n], left[s], right[0], right[1]);
        mma::multiply_add<T>(scores[n + 1], left[s], right[2], right[3]);
      }
      ZS3FAST_UNROLL
      for (int i = 0; i < 8; ++i) scores[n + i / 4][i % 4] = scores[n + i / 4][i % 4] * scale;
    }
    if (key + kStep > keys) mma::cut_off(scores, key, keys);  // the last step
    softmax.step(scores);
    ZS3FAST_UNROLL
    for (int s = 0; s < kStep / 16; ++s) {
      Lanes<uint32_t> probabilities[4];
      mma::as_operand<T>(probabilities, scores[2 * s], scores[2 * s + 1]);
      ZS3FAST_UNROLL
      for (int n = 0; n < kTiles; n += 2) {
        Lanes<uint32_t> values[4];  // 8 columns of both halves of 16 keys; of 8 columns more
        block.template load_matrices<true>(
            values, swizzled<kDh>(line + matrix % 2 * 8 + 16 * s, matrix / 2 + n) + v_tile);
        mma::multiply_add<T>(softmax.sums[n], probabilities, values[0], values[1]);
        mma::multiply_add<T>(softmax.sums[n + 1], probabilities, values[2], values[3]);
      }
    }
  }

  mma::write_rows<T>(softmax, p.output.of(b, a), p.lse_of(head), row, inside);
}

// Block `program` of p.blocks().
template <class T, int kDh>
ZS3FAST_BODY void attend(mma::Block& block, const Problem<T>& p, int program) {
  const int region_programs = p.images * p.heads * p.region_blocks();
  if (program < region_programs) {
    attend_regions<T, kDh, kWarps>(block, p, program / p.region_blocks(), program % p.region_blocks() * kRegions);
  } else {
    program -= region_programs;
    attend_rows<T, kDh>(block, p, program / p.row_blocks(), program % p.row_blocks() * kRows);
  }
}

}  // namespace zs3fast::region_bridge_attention
