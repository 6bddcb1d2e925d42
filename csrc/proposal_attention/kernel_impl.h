// The kernels of kernel.h, compiled once an instruction set: the including file names it in ZS3FAST_ISA.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "proposal_attention/kernel.h"
#include "simd.h"

namespace zs3fast::proposal_attention {
namespace {

// Sums over listed rows keep kChunk vectors.
#if defined(__AVX512F__)
constexpr int kChunk = 4;
#else
constexpr int kChunk = 8;
#endif
constexpr int kUnit = kPad / kLanes;  // vectors of the narrowest head

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

float* take(float*& scratch, int64_t floats) {
  float* p = scratch;
  scratch += round_up(floats);
  return p;
}

// Sums of whole vectors -----------------------------------------------------------------------------------------------

template <int kWidth, size_t... I>
inline Float pair_up(Float a, Float b, std::index_sequence<I...>) {
  constexpr auto from = [](int lane, int upper) {
    const int other = lane & kWidth;  // lanes with this bit are b's
    return other ? kLanes + lane - (upper ? 0 : kWidth) : lane + (upper ? kWidth : 0);
  };
  return __builtin_shuffle(a, b, Int{from(I, 0)...}) + __builtin_shuffle(a, b, Int{from(I, 1)...});
}

// Lane i of the result is the sum of x[i]'s lanes.
template <int kWidth = 1>
inline Float sums_of(Float* x) {
  for (int i = 0; i < kLanes / kWidth / 2; ++i)
    x[i] = pair_up<kWidth>(x[2 * i], x[2 * i + 1], std::make_index_sequence<kLanes>());
  if constexpr (2 * kWidth < kLanes)
    return sums_of<2 * kWidth>(x);
  else
    return x[0];
}

template <int kWidth, size_t... I>
inline Float rotate(Float x, std::index_sequence<I...>) {
  return __builtin_shuffle(x, Int{static_cast<int>((I + kWidth) % kLanes)...});
}

// All lanes of a vector joined by a sum or a maximum, halving it at each step.
template <int kWidth = kLanes / 2, class Join>
inline float across(Float x, Join join) {
  x = join(x, rotate<kWidth>(x, std::make_index_sequence<kLanes>()));
  if constexpr (kWidth > 1)
    return across<kWidth / 2>(x, join);
  else
    return x[0];
}
inline float sum_of(Float x) {
  return across(x, [](Float a, Float b) { return a + b; });
}
inline float largest_of(Float x) {
  return across(x, [](Float a, Float b) { return a > b ? a : b; });
}

inline float dot(const float* a, const float* b, int64_t n) {
  Float sum{};
  for (int64_t d = 0; d < n; d += kLanes) sum += load(a + d) * load(b + d);
  return sum_of(sum);
}

inline void add(float* to, float factor, const float* x, int64_t n) {  // to += factor * x
  for (int64_t d = 0; d < n; d += kLanes) store(to + d, load(to + d) + factor * load(x + d));
}

// Products of q with kLanes listed rows. Four at a time: as many sums as hide a multiplication's latency.
inline Float dots(const float* q, Rows<const float> rows, const int32_t* list, int64_t dh) {
  Float sums[kLanes];
#pragma GCC unroll 4
  for (int g = 0; g < kLanes; g += 4) {
    const float *a = rows[list[g]], *b = rows[list[g + 1]], *c = rows[list[g + 2]], *d = rows[list[g + 3]];
    Float s0{}, s1{}, s2{}, s3{};
    for (int64_t i = 0; i < dh; i += kLanes) {
      const Float left = load(q + i);
      s0 += left * load(a + i);
      s1 += left * load(b + i);
      s2 += left * load(c + i);
      s3 += left * load(d + i);
    }
    sums[g] = s0;
    sums[g + 1] = s1;
    sums[g + 2] = s2;
    sums[g + 3] = s3;
  }
  return sums_of(sums);
}

// to[i] = q . rows[list[i]]; what is left of the last vector repeats the last row.
inline void all_dots(const float* q, Rows<const float> rows, const int32_t* list, int64_t count, int64_t dh, float* to) {
  int64_t i = 0;
  if (dh == 64)  // CLIP's: known when compiled, the loop over columns goes and q stays in registers
    for (; i + kLanes <= count; i += kLanes) store(to + i, dots(q, rows, list + i, 64));
  for (; i + kLanes <= count; i += kLanes) store(to + i, dots(q, rows, list + i, dh));
  if (i == count) return;
  int32_t tail[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) tail[j] = list[min(i + j, count - 1)];
  store(to + i, dots(q, rows, tail, dh));
}

// to = factor * start + sum of weights[at(i)] * rows[list[i]], V vectors of the columns.
template <int V, class At>
inline void weighted(float factor, const float* start, const float* weights, At at, Rows<const float> rows,
                     const int32_t* list, int64_t count, float* to) {
  Float sum[V];
#pragma GCC unroll 8
  for (int j = 0; j < V; ++j) sum[j] = factor * load(start + j * kLanes);
  for (int64_t i = 0; i < count; ++i) {
    const float* x = rows[list[i]];
    const Float weight = all(weights[at(i)]);
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) sum[j] += weight * load(x + j * kLanes);
  }
#pragma GCC unroll 8
  for (int j = 0; j < V; ++j) store(to + j * kLanes, sum[j]);
}

template <class At>
inline void weighted_sum(float factor, const float* start, const float* weights, At at, Rows<const float> rows,
                         const int32_t* list, int64_t count, int64_t dh, float* to) {
  int64_t d = 0;
  for (; d + kChunk * kLanes <= dh; d += kChunk * kLanes)
    weighted<kChunk>(factor, start + d, weights, at, {rows.data + d, rows.stride}, list, count, to + d);
  for (; d < dh; d += kUnit * kLanes)
    weighted<kUnit>(factor, start + d, weights, at, {rows.data + d, rows.stride}, list, count, to + d);
}

constexpr auto in_order = [](int64_t i) { return i; };

void copy(const float* from, float* to, int64_t n) { std::memcpy(to, from, n * sizeof(float)); }

// Scaled rows of a tile as columns: to[dh, kTile], zeros behind the last row.
void transpose(Rows<const float> x, const Tile& tile, int64_t dh, float factor, float* to) {
  for (int64_t d = 0; d < dh; ++d)
    for (int64_t r = 0; r < kTile; ++r) to[d * kTile + r] = r < tile.rows ? factor * x[tile.first + r][d] : 0.0f;
}

// Patches [i, i + n) of a dense tile as neighbouring rows: where they lie if they are neighbours, else copied.
Rows<const float> gather(Rows<const float> x, const Tile& tile, int64_t i, int64_t n, int64_t dh, float* to) {
  const int32_t* list = tile.patches + i;
  if (list[n - 1] - list[0] == n - 1) return {x[list[0]], x.stride};
  for (int64_t j = 0; j < n; ++j) copy(x[list[j]], to + j * dh, dh);
  return {to, dh};
}

// All ones in the lanes of the rows that keep a patch; `vector` counts the vectors of a tile.
inline Int kept(uint16_t rows, int vector) {
  Int lane{};
  for (int i = 0; i < kLanes; ++i) lane[i] = 1 << i;
  return (((rows >> (vector * kLanes)) - Int{}) & lane) != 0;
}

// Forward -------------------------------------------------------------------------------------------------------------

void forward_sparse(const Forward& f, const Tile& tile, float* q, float* p) {
  const int64_t dh = f.dh;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t row = tile.first + r, count = tile.begin[r + 1] - tile.begin[r];
    const int32_t* list = tile.patches + tile.begin[r];
    const float* from = f.q[row];
    for (int64_t d = 0; d < dh; ++d) q[d] = from[d] * f.scale;
    const float own = dot(q, f.k_self[row], dh);
    all_dots(q, f.k, list, count, dh, p);
    for (int64_t i = count; i % kLanes != 0; ++i) p[i] = -std::numeric_limits<float>::infinity();

    Float most = all(own);
    for (int64_t i = 0; i < count; i += kLanes) {
      const Float s = load(p + i);
      most = s > most ? s : most;
    }
    const float largest = largest_of(most);
    Float sum{};
    for (int64_t i = 0; i < count; i += kLanes) {
      const Float x = exponential(load(p + i) - largest);
      sum += x;
      store(p + i, x);
    }
    const float start = std::exp(own - largest), total = start + sum_of(sum);

    float* out = f.output[row];
    weighted_sum(start, f.v_self[row], p, in_order, f.v, list, count, dh, out);
    const Float inverse = all(1.0f / total);
    for (int64_t d = 0; d < dh; d += kLanes) store(out + d, load(out + d) * inverse);
    f.lse[row] = largest + std::log(total);
  }
}

void forward_dense(const Forward& f, const Tile& tile, float* scratch) {
  const int64_t dh = f.dh;
  float* q = take(scratch, dh * kTile);    // [dh, row], scaled
  float* out = take(scratch, kTile * dh);  // [row, dh]
  float* largest = take(scratch, kTile);
  float* total = take(scratch, kTile);
  float* shrink = take(scratch, kTile);
  float* scores = take(scratch, kPatchBlock * kTile);  // [patch, row], later the probabilities
  float* k_rows = take(scratch, kPatchBlock * dh);
  float* v_rows = take(scratch, kPatchBlock * dh);

  transpose(f.q, tile, dh, f.scale, q);
  for (int64_t r = 0; r < kTile; ++r) {  // rows that are not there repeat the last one and are not written
    const int64_t row = tile.first + min(r, tile.rows - 1);
    largest[r] = f.scale * dot(f.q[row], f.k_self[row], dh);
    total[r] = 1.0f;
    copy(f.v_self[row], out + r * dh, dh);
  }
  for (int64_t first = 0; first < tile.count; first += kPatchBlock) {
    const int64_t n = min(kPatchBlock, tile.count - first);
    const Rows<const float> k = gather(f.k, tile, first, n, dh, k_rows), v = gather(f.v, tile, first, n, dh, v_rows);
    gemm(n, kTile, dh, k.data, k.stride, 1, q, kTile, scores, kTile, false);
    for (int vector = 0; vector < kUnit; ++vector) {
      float* column = scores + vector * kLanes;
      const Float before = load(largest + vector * kLanes);
      Float now = before;
      for (int64_t i = 0; i < n; ++i) {
        const Float s = load(column + i * kTile);
        now = kept(tile.keeps[first + i], vector) & (s > now) ? s : now;
      }
      const Float factor = exponential(before - now);
      Float sum = load(total + vector * kLanes) * factor;
      for (int64_t i = 0; i < n; ++i) {
        const Float p = exponential(load(column + i * kTile) - now);
        const Float kept_p = kept(tile.keeps[first + i], vector) ? p : Float{};
        sum += kept_p;
        store(column + i * kTile, kept_p);
      }
      store(largest + vector * kLanes, now);
      store(total + vector * kLanes, sum);
      store(shrink + vector * kLanes, factor);
    }
    for (int64_t r = 0; r < tile.rows; ++r)
      for (int64_t d = 0; d < dh; d += kLanes) store(out + r * dh + d, load(out + r * dh + d) * shrink[r]);
    gemm(tile.rows, dh, n, scores, 1, kTile, v.data, v.stride, out, dh, true);
  }
  for (int64_t r = 0; r < tile.rows; ++r) {
    const Float inverse = all(1.0f / total[r]);
    float* to = f.output[tile.first + r];
    for (int64_t d = 0; d < dh; d += kLanes) store(to + d, load(out + r * dh + d) * inverse);
    f.lse[tile.first + r] = largest[r] + std::log(total[r]);
  }
}

int64_t forward_scratch(int64_t patches, int64_t dh) {
  const int64_t dense = (2 * kTile + 2 * kPatchBlock) * dh + (3 + kPatchBlock) * kTile;
  const int64_t sparse = dh + round_up(patches);
  return dense > sparse ? dense : sparse;
}

void forward(const Forward& f, const Tile* tiles, int64_t count, float* scratch) {
  for (int64_t i = 0; i < count; ++i) {
    if (tiles[i].dense)
      forward_dense(f, tiles[i], scratch);
    else
      forward_sparse(f, tiles[i], scratch, scratch + f.dh);
  }
}

// Backward ------------------------------------------------------------------------------------------------------------

// What a row owes to itself, which also gives dk_self and dv_self. delta = sum over the row of p dp.
struct Own {
  float delta, ds;
};

inline Own backward_self(const Backward& g, int64_t row) {
  const int64_t dh = g.dh;
  const float *grad = g.grad_output[row], *q = g.q[row];
  const float delta = dot(grad, g.output[row], dh);
  const float p = std::exp(g.scale * dot(q, g.k_self[row], dh) - g.lse[row]);
  const float ds = g.scale * p * (dot(grad, g.v_self[row], dh) - delta);
  float *dk = g.dk_self[row], *dv = g.dv_self[row];
  for (int64_t d = 0; d < dh; ++d) {
    dk[d] = ds * q[d];
    dv[d] = p * grad[d];
  }
  return {delta, ds};
}

// dq of the rows; p and ds of their pairs for `backward_patches`.
void backward_sparse(const Backward& g, const Tile& tile, float* p, float* ds) {
  p += tile.pairs_before;
  ds += tile.pairs_before;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t row = tile.first + r, begin = tile.begin[r], count = tile.begin[r + 1] - begin;
    const int32_t* list = tile.patches + begin;
    const Own own = backward_self(g, row);
    // in order of the rows: what spills over a row's end is overwritten by the next
    all_dots(g.q[row], g.k, list, count, g.dh, p + begin);
    all_dots(g.grad_output[row], g.v, list, count, g.dh, ds + begin);
    for (int64_t i = begin; i < begin + count; i += kLanes) {
      const Float probability = exponential(load(p + i) * g.scale - g.lse[row]);
      store(p + i, probability);
      store(ds + i, probability * (load(ds + i) - own.delta) * g.scale);
    }
    weighted_sum(own.ds, g.k_self[row], ds + begin, in_order, g.k, list, count, g.dh, g.dq[row]);
  }
}

// dk and dv of every patch, what dense tiles gave included.
void backward_patches(const Backward& g, const ByPatch& pairs, const float* p, const float* ds, const float* dk,
                      const float* dv) {
  for (int64_t n = 0; n < g.patches; ++n) {
    const int64_t begin = pairs.begin[n], count = pairs.begin[n + 1] - begin;
    const int32_t *rows = pairs.row + begin, *pair = pairs.pair + begin;
    const auto at = [pair](int64_t i) { return pair[i]; };
    weighted_sum(1.0f, dk + n * g.dh, ds, at, g.q, rows, count, g.dh, g.dk[n]);
    weighted_sum(1.0f, dv + n * g.dh, p, at, g.grad_output, rows, count, g.dh, g.dv[n]);
  }
}

// Adds rows of a block's gradient to those of their patches.
void scatter(const float* from, const int32_t* list, int64_t n, int64_t dh, float* to) {
  for (int64_t i = 0; i < n; ++i) add(to + list[i] * dh, 1.0f, from + i * dh, dh);
}

void backward_dense(const Backward& g, const Tile& tile, float* dk, float* dv, float* scratch) {
  const int64_t dh = g.dh;
  float* q = take(scratch, kTile * dh);      // [row, dh], scaled
  float* grad = take(scratch, kTile * dh);   // [row, dh]
  float* dq = take(scratch, kTile * dh);     // [row, dh]
  float* q_columns = take(scratch, dh * kTile);     // [dh, row], scaled
  float* grad_columns = take(scratch, dh * kTile);  // [dh, row]
  float* lse = take(scratch, kTile);
  float* delta = take(scratch, kTile);
  float* p = take(scratch, kPatchBlock * kTile);   // [patch, row]
  float* ds = take(scratch, kPatchBlock * kTile);  // [patch, row]
  float* k_rows = take(scratch, kPatchBlock * dh);
  float* v_rows = take(scratch, kPatchBlock * dh);
  float* sums = take(scratch, kPatchBlock * dh);

  transpose(g.q, tile, dh, g.scale, q_columns);
  transpose(g.grad_output, tile, dh, 1.0f, grad_columns);
  for (int64_t r = 0; r < kTile; ++r) {
    lse[r] = delta[r] = 0.0f;
    if (r >= tile.rows) continue;
    const int64_t row = tile.first + r;
    const Own own = backward_self(g, row);
    delta[r] = own.delta;
    lse[r] = g.lse[row];
    for (int64_t d = 0; d < dh; ++d) {
      q[r * dh + d] = g.scale * g.q[row][d];
      grad[r * dh + d] = g.grad_output[row][d];
      dq[r * dh + d] = own.ds * g.k_self[row][d];
    }
  }
  for (int64_t first = 0; first < tile.count; first += kPatchBlock) {
    const int64_t n = min(kPatchBlock, tile.count - first);
    const int32_t* list = tile.patches + first;
    const Rows<const float> k = gather(g.k, tile, first, n, dh, k_rows), v = gather(g.v, tile, first, n, dh, v_rows);
    gemm(n, kTile, dh, k.data, k.stride, 1, q_columns, kTile, p, kTile, false);
    gemm(n, kTile, dh, v.data, v.stride, 1, grad_columns, kTile, ds, kTile, false);
    for (int vector = 0; vector < kUnit; ++vector) {
      const Float log_sum = load(lse + vector * kLanes), correction = load(delta + vector * kLanes);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = i * kTile + vector * kLanes;
        const Float probability = exponential(load(p + at) - log_sum);
        const Float kept_p = kept(tile.keeps[first + i], vector) ? probability : Float{};
        store(p + at, kept_p);
        store(ds + at, kept_p * (load(ds + at) - correction));
      }
    }
    const bool neighbours = list[n - 1] - list[0] == n - 1;
    float *to_k = dk + list[0] * dh, *to_v = dv + list[0] * dh;
    gemm(n, dh, tile.rows, ds, kTile, 1, q, dh, neighbours ? to_k : sums, dh, neighbours);
    if (!neighbours) scatter(sums, list, n, dh, dk);
    gemm(n, dh, tile.rows, p, kTile, 1, grad, dh, neighbours ? to_v : sums, dh, neighbours);
    if (!neighbours) scatter(sums, list, n, dh, dv);
    for (int64_t i = 0; i < n * kTile; i += kLanes) store(ds + i, load(ds + i) * g.scale);
    gemm(tile.rows, dh, n, ds, 1, kTile, k.data, k.stride, dq, dh, true);
  }
  for (int64_t r = 0; r < tile.rows; ++r) copy(dq + r * dh, g.dq[tile.first + r], dh);
}

int64_t backward_scratch(int64_t patches, int64_t dh, int64_t sparse_pairs) {
  const int64_t dense = (5 * kTile + 3 * kPatchBlock) * dh + 2 * (1 + kPatchBlock) * kTile;
  return 2 * patches * dh + 2 * round_up(sparse_pairs + kLanes) + dense;
}

void backward(const Backward& g, const Tile* tiles, int64_t count, const ByPatch& pairs, float* scratch) {
  const int64_t floats = g.patches * g.dh;
  float *dk = take(scratch, floats), *dv = take(scratch, floats);
  float *p = take(scratch, pairs.pairs + kLanes), *ds = take(scratch, pairs.pairs + kLanes);
  for (int64_t i = 0; i < floats; ++i) dk[i] = dv[i] = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    if (tiles[i].dense)
      backward_dense(g, tiles[i], dk, dv, scratch);
    else
      backward_sparse(g, tiles[i], p, ds);
  }
  backward_patches(g, pairs, p, ds, dk, dv);
}

}  // namespace

const Kernels ZS3FAST_ISA = {forward_scratch, forward, backward_scratch, backward};

}  // namespace zs3fast::proposal_attention
