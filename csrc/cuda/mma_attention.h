// What the tensor-core attention kernels share: where rows lie, the online softmax, and rows under a mask of their own.
#pragma once

#include "cuda/mma.h"
#include "cuda/mma_rows.h"

namespace zs3fast::mma {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kMinusInfinity = -cuda::kInfinity;

// Element (row, column) of every lane.
template <class T>
ZS3FAST_BODY Lanes<int64_t> address(const Rows<T>& rows, Lanes<int> row, Lanes<int> column) {
  return cast<int64_t>(row) * rows.stride + cast<int64_t>(column);
}

// The online softmax of 16 rows: a lane holds rows group and group + 8 of them. `total` is the lane's share of a sum
// over the group, `sums` a 16 x 8 kTiles matrix of weighted values. Scores are in units of log2.
template <int kTiles>
struct Softmax {
  Lanes<float> largest[2], total[2];
  Lanes<float> sums[kTiles][4];

  ZS3FAST_BODY void start_empty() {
    ZS3FAST_UNROLL
    for (int half = 0; half < 2; ++half) {
      largest[half] = kMinusInfinity;
      total[half] = 0.0f;
    }
    ZS3FAST_UNROLL
    for (int i = 0; i < 4 * kTiles; ++i) sums[i / 4][i % 4] = 0.0f;
  }

  // Scores, -inf where a row does not see a key, become probabilities relative to the largest score so far, and
  // `shrink` what sums so far have to be multiplied by.
  template <int kKeyTiles>
  ZS3FAST_BODY void weigh(Lanes<float> (&scores)[kKeyTiles][4], Lanes<float> (&shrink)[2]) {
    ZS3FAST_UNROLL
    for (int half = 0; half < 2; ++half) {
      Lanes<float> now = largest[half];
      ZS3FAST_UNROLL
      for (int n = 0; n < kKeyTiles; ++n) now = larger(now, larger(scores[n][2 * half], scores[n][2 * half + 1]));
      now = largest_of_group(now);
      // a row that saw nothing yet has no largest score
      const Lanes<float> base = select(now == kMinusInfinity, Lanes<float>(0.0f), now);
      shrink[half] = exp_2(largest[half] - base);
      total[half] = total[half] * shrink[half];
      ZS3FAST_UNROLL
      for (int n = 0; n < kKeyTiles; ++n)
        ZS3FAST_UNROLL
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[n][i] = exp_2(scores[n][i] - base);
          total[half] = total[half] + scores[n][i];
        }
      largest[half] = now;
    }
  }

  ZS3FAST_BODY void scale_sums(const Lanes<float> (&shrink)[2]) {
    ZS3FAST_UNROLL
    for (int i = 0; i < 4 * kTiles; ++i) sums[i / 4][i % 4] = sums[i / 4][i % 4] * shrink[i % 4 / 2];
  }

  template <int kKeyTiles>
  ZS3FAST_BODY void step(Lanes<float> (&scores)[kKeyTiles][4]) {
    Lanes<float> shrink[2];
    weigh(scores, shrink);
    scale_sums(shrink);
  }
};

// Probabilities of 16 keys as the left operand of their product with values: sums of one product lie as operands do.
template <class T>
ZS3FAST_BODY void as_operand(Lanes<uint32_t> (&to)[4], const Lanes<float> (&first)[4],
                               const Lanes<float> (&second)[4]) {
  to[0] = pack<T>(first[0], first[1]);
  to[1] = pack<T>(first[2], first[3]);
  to[2] = pack<T>(second[0], second[1]);
  to[3] = pack<T>(second[2], second[3]);
}

// 16 rows of q as left operands of products over their columns: word i of piece s holds row i % 2 of the lane's two,
// columns 16 s + 8 (i / 2) + 2 place and one more.
template <int kDh, class T>
ZS3FAST_BODY void load_rows(Lanes<uint32_t> (&left)[kDh / 16][4], const Rows<const T>& q, const Lanes<int> (&row)[2],
                            const Lanes<bool> (&inside)[2]) {
  const Lanes<int> place = lane_index() % 4;
  ZS3FAST_UNROLL
  for (int i = 0; i < kDh / 4; ++i) {
    Lanes<uint32_t> word[1];
    load<1>(word, q.data, address(q, row[i % 2], 2 * place + i / 2 * 8), inside[i % 2]);
    left[i / 4][i % 4] = word[0];
  }
}

// The softmax of row `half` of the lane's two starts at key and value `own` of k and v, or empty where that is
// negative.
template <class T, int kTiles>
ZS3FAST_BODY void start_at_own(Softmax<kTiles>& softmax, int half, const Lanes<uint32_t> (&left)[kTiles / 2][4],
                               const Rows<const T>& k, const Rows<const T>& v, Lanes<int> own, float scale) {
  const Lanes<int> place = lane_index() % 4;
  const Lanes<bool> owned = own >= 0;
  Lanes<float> score = 0.0f;
  ZS3FAST_UNROLL
  for (int n = 0; n < kTiles; ++n) {
    Lanes<uint32_t> word[1];
    const Lanes<int> column = 2 * place + 8 * n;
    load<1>(word, k.data, address(k, own, column), owned);
    score = dot_pairs<T>(left[n / 2][n % 2 * 2 + half], word[0], score);
    load<1>(word, v.data, address(v, own, column), owned);
    unpack<T>(word[0], softmax.sums[n][2 * half], softmax.sums[n][2 * half + 1]);
  }
  softmax.largest[half] = select(owned, sum_of_group(score) * scale, kMinusInfinity);
  softmax.total[half] = select(owned & (place == 0), Lanes<float>(1.0f), 0.0f);
}

// Scores of keys [key, key + 8 kKeyTiles) become -inf from key `end` on.
template <int kKeyTiles>
ZS3FAST_BODY void cut_off(Lanes<float> (&scores)[kKeyTiles][4], int key, int end) {
  const Lanes<int> place = lane_index() % 4;
  ZS3FAST_UNROLL
  for (int i = 0; i < 4 * kKeyTiles; ++i) {
    const Lanes<int> at = 2 * place + (key + i / 4 * 8 + i % 2);
    scores[i / 4][i % 4] = select(at < end, scores[i / 4][i % 4], kMinusInfinity);
  }
}

// The lane's two rows of the result and their log-sum-exp.
template <class T, int kTiles>
ZS3FAST_BODY void write_rows(const Softmax<kTiles>& softmax, const Rows<T>& output, float* lse_of_rows,
                             const Lanes<int> (&row)[2], const Lanes<bool> (&inside)[2]) {
  const Lanes<int> place = lane_index() % 4;
  ZS3FAST_UNROLL
  for (int half = 0; half < 2; ++half) {
    const Lanes<float> total = sum_of_group(softmax.total[half]), inverse = Lanes<float>(1.0f) / total;
    const Lanes<uint32_t> lse[1] = {as_bits((softmax.largest[half] + log_2(total)) * kLn2)};
    store<1>(lse_of_rows, cast<int64_t>(row[half]), lse, inside[half] & (place == 0));
    ZS3FAST_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      const Lanes<uint32_t> word[1] = {
          pack<T>(softmax.sums[n][2 * half] * inverse, softmax.sums[n][2 * half + 1] * inverse)};
      store<1>(output.data, address(output, row[half], 2 * place + 8 * n), word, inside[half]);
    }
  }
}

// 16 rows, each over itself and the keys that its bits keep ----------------------------------------------------------

template <class T>
struct MaskedRows {
  int rows;  // of 16, those that exist
  Rows<const T> q, k_self, v_self;
  int begin, end, keys;  // keys [begin, end) of `keys` are looked at
  Rows<const T> k, v;
  float scale;
  Rows<T> output;
  float* lse;
};

template <int kDh, int kWarps>
constexpr int kMaskedRowsShared = kWarps * (16 * kDh + 2 * 16) * 4;  // bytes

// The keys are dealt to the warps of the block, 32 at a time: a warp reads the bits of all 16 rows, goes on at once if
// no row keeps any, and else reads keys and values straight into registers, 16 bytes a lane. Nothing that a warp reads
// is read by another warp of the block, so shared memory would be a detour; it serves at the end, when the warps'
// softmaxes are added up.
//
// A product's sum may run over the columns, and its result over the columns, in any order as long as both operands
// agree. So a lane takes 8 neighbouring columns of q and k and calls them the pairs that the fragments of two products
// ask for, and 8 neighbouring columns of v and gives each to another 8 x 8 tile of the result.
//
// bits(key) gives a lane the mask of row lane % 16 over keys [key, key + 32), zeros from `end` on.
template <class T, int kDh, int kWarps, class Bits>
ZS3FAST_BODY void masked_rows(Block& block, const MaskedRows<T>& tile, Bits bits) {
  static_assert(kDh % 32 == 0);
  constexpr int kChunks = kDh / 32;               // of 32 columns: q, k
  constexpr int kVector = kDh % 64 == 0 ? 8 : 4;  // columns of v a lane reads at once
  constexpr int kParts = kDh / (8 * kVector);     // vectors of a row of v that it reads
  constexpr int kTiles = kDh / 8;
  const Lanes<int> lane = lane_index(), group = lane / 4, place = lane % 4;
  const Lanes<int> row[2] = {group, group + 8};
  const Lanes<bool> inside[2] = {row[0] < tile.rows, row[1] < tile.rows};
  const float scale = tile.scale * kLog2e;

  Lanes<uint32_t> left[kChunks][2][4];
  ZS3FAST_UNROLL
  for (int c = 0; c < kChunks; ++c)
    ZS3FAST_UNROLL
    for (int half = 0; half < 2; ++half)
      load<4>(left[c][half], tile.q.data, address(tile.q, row[half], 8 * place + 32 * c), inside[half]);

  Softmax<kTiles> softmax;
  softmax.start_empty();
  if (block.warp == 0) {  // the row's own token is where the softmax starts
    ZS3FAST_UNROLL
    for (int half = 0; half < 2; ++half) {
      Lanes<float> own = 0.0f;
      ZS3FAST_UNROLL
      for (int c = 0; c < kChunks; ++c) {
        Lanes<uint32_t> words[4];
        load<4>(words, tile.k_self.data, address(tile.k_self, row[half], 8 * place + 32 * c), inside[half]);
        ZS3FAST_UNROLL
        for (int i = 0; i < 4; ++i) own = dot_pairs<T>(left[c][half][i], words[i], own);
      }
      softmax.largest[half] = sum_of_group(own) * scale;
      softmax.total[half] = select(place == 0, Lanes<float>(1.0f), 0.0f);
      ZS3FAST_UNROLL
      for (int c = 0; c < kParts; ++c)
        ZS3FAST_UNROLL
        for (int i = 0; i < 2; ++i) {  // columns 8 kVector c + kVector (2 place + i) and on
          Lanes<uint32_t> words[kVector / 2];
          load<kVector / 2>(words, tile.v_self.data,
                            address(tile.v_self, row[half], 2 * kVector * place + kVector * (8 * c + i)), inside[half]);
          ZS3FAST_UNROLL
          for (int j = 0; j < kVector; j += 2)
            unpack<T>(words[j / 2], softmax.sums[c * kVector + j][2 * half + i],
                      softmax.sums[c * kVector + j + 1][2 * half + i]);
        }
    }
  }

  const int first = tile.begin + 32 * block.warp;
  Lanes<uint32_t> next = bits(first);
  for (int key = first; key < tile.end; key += 32 * kWarps) {
    const Lanes<uint32_t> word = next;
    next = bits(key + 32 * kWarps);
    if (!any(word != 0u)) continue;

    Lanes<uint32_t> right[4][kChunks][4];  // 8 keys each
    ZS3FAST_UNROLL
    for (int n = 0; n < 4; ++n) {
      const Lanes<int> at = group + (key + 8 * n);
      ZS3FAST_UNROLL
      for (int c = 0; c < kChunks; ++c)
        load<4>(right[n][c], tile.k.data, address(tile.k, at, 8 * place + 32 * c), at < tile.keys);
    }
    Lanes<uint32_t> values[2][kParts][4][kVector / 2];  // 16 keys each
    const auto read_values = [&](int s) {
      ZS3FAST_UNROLL
      for (int i = 0; i < 4; ++i) {
        const Lanes<int> at = 2 * place + (key + 16 * s + i % 2 + i / 2 * 8);
        ZS3FAST_UNROLL
        for (int c = 0; c < kParts; ++c)
          load<kVector / 2>(values[s][c][i], tile.v.data, address(tile.v, at, kVector * group + 8 * kVector * c),
                            at < tile.keys);
      }
    };
    constexpr bool kEarly = kDh <= 64;  // on their way while scores are made, where there are registers for it
    if constexpr (kEarly) read_values(0), read_values(1);

    Lanes<float> scores[4][4];
    const Lanes<uint32_t> keep[2] = {shuffle(word, row[0]) >> cast<uint32_t>(2 * place),
                                     shuffle(word, row[1]) >> cast<uint32_t>(2 * place)};
    ZS3FAST_UNROLL
    for (int n = 0; n < 4; ++n) {
      ZS3FAST_UNROLL
      for (int i = 0; i < 4; ++i) scores[n][i] = 0.0f;
      ZS3FAST_UNROLL
      for (int c = 0; c < kChunks; ++c)
        ZS3FAST_UNROLL
        for (int i = 0; i < 4; i += 2) {
          const Lanes<uint32_t> a[4] = {left[c][0][i], left[c][1][i], left[c][0][i + 1], left[c][1][i + 1]};
          multiply_add<T>(scores[n], a, right[n][c][i], right[n][c][i + 1]);
        }
      ZS3FAST_UNROLL
      for (int i = 0; i < 4; ++i)
        scores[n][i] = select((keep[i / 2] & (1u << (8 * n + i % 2))) != 0u, scores[n][i] * scale, kMinusInfinity);
    }
    softmax.step(scores);
    ZS3FAST_UNROLL
    for (int s = 0; s < 2; ++s) {
      if constexpr (!kEarly) read_values(s);
      Lanes<uint32_t> p[4];
      as_operand<T>(p, scores[2 * s], scores[2 * s + 1]);
      ZS3FAST_UNROLL
      for (int c = 0; c < kParts; ++c)
        ZS3FAST_UNROLL
        for (int j = 0; j < kVector; j += 2) {
          const auto& [v0, v1, v8, v9] = values[s][c];
          multiply_add<T>(softmax.sums[c * kVector + j], p, pair_of<false>(v0[j / 2], v1[j / 2]),
                          pair_of<false>(v8[j / 2], v9[j / 2]));
          multiply_add<T>(softmax.sums[c * kVector + j + 1], p, pair_of<true>(v0[j / 2], v1[j / 2]),
                          pair_of<true>(v8[j / 2], v9[j / 2]));
        }
    }
  }

  // Shared memory: [kWarps][kDh / 8][32 lanes] pieces of four sums (same row, neighbouring columns), then [kWarps][16]
  // largest scores and totals.
  constexpr int kPieces = kDh / 8, kPiece = 16;
  constexpr int kLargest = kWarps * kPieces * 32 * kPiece, kTotal = kLargest + kWarps * 16 * 4;
  static_assert(kTotal + kWarps * 16 * 4 == kMaskedRowsShared<kDh, kWarps>);
  ZS3FAST_UNROLL
  for (int half = 0; half < 2; ++half) {
    const Lanes<int> at = 4 * row[half] + 64 * block.warp;
    block.write(at + kLargest, softmax.largest[half], place == 0);
    block.write(at + kTotal, sum_of_group(softmax.total[half]), place == 0);
  }
  ZS3FAST_UNROLL
  for (int piece = 0; piece < kPieces; ++piece) {
    const int tile4 = piece / 4 * 4, i = piece % 4;
    const Lanes<float> four[4] = {softmax.sums[tile4][i], softmax.sums[tile4 + 1][i], softmax.sums[tile4 + 2][i],
                                  softmax.sums[tile4 + 3][i]};
    block.write(kPiece * lane + kPiece * 32 * (block.warp * kPieces + piece), four);
  }
  block.sync();

  // Pieces are dealt to the warps; every warp adds up the warps' shares of its pieces.
  Lanes<float> factor[2][kWarps], lse[2];
  ZS3FAST_UNROLL
  for (int half = 0; half < 2; ++half) {
    Lanes<float> largest = kMinusInfinity, total = 0.0f;
    ZS3FAST_UNROLL
    for (int warp = 0; warp < kWarps; ++warp) {
      factor[half][warp] = block.read(4 * row[half] + (64 * warp + kLargest));
      largest = larger(largest, factor[half][warp]);
    }
    ZS3FAST_UNROLL
    for (int warp = 0; warp < kWarps; ++warp) {
      factor[half][warp] = exp_2(factor[half][warp] - largest);
      total = fused(factor[half][warp], block.read(4 * row[half] + (64 * warp + kTotal)), total);
    }
    ZS3FAST_UNROLL
    for (int warp = 0; warp < kWarps; ++warp) factor[half][warp] = factor[half][warp] / total;
    lse[half] = (largest + log_2(total)) * kLn2;
  }
  if (block.warp == 0)
    ZS3FAST_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Lanes<uint32_t> word[1] = {as_bits(lse[half])};
      store<1>(tile.lse, cast<int64_t>(row[half]), word, inside[half] & (place == 0));
    }
  ZS3FAST_UNROLL
  for (int round = 0; round < (kPieces + kWarps - 1) / kWarps; ++round) {
    const int piece = round * kWarps + block.warp;
    if (piece >= kPieces) break;
    const int half = piece % 4 / 2, tile4 = piece / 4 * 4;
    Lanes<float> sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    ZS3FAST_UNROLL
    for (int warp = 0; warp < kWarps; ++warp) {
      Lanes<float> share[4];
      block.read(share, kPiece * lane + kPiece * 32 * (warp * kPieces + piece));
      const Lanes<float> weight = half == 0 ? factor[0][warp] : factor[1][warp];
      ZS3FAST_UNROLL
      for (int i = 0; i < 4; ++i) sum[i] = fused(weight, share[i], sum[i]);
    }
    const int part = tile4 / kVector, column = 8 * kVector * part + kVector * (piece % 2) + tile4 % kVector;
    const Lanes<uint32_t> words[2] = {pack<T>(sum[0], sum[1]), pack<T>(sum[2], sum[3])};
    const Lanes<int> to = half == 0 ? row[0] : row[1];
    store<2>(tile.output.data, address(tile.output, to, 2 * kVector * place + column), words, to < tile.rows);
  }
}

}  // namespace zs3fast::mma
