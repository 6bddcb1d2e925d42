// The kernels of kernel.h, compiled once an instruction set: the including file names it in ZS3FAST_ISA.
#include <cstdint>
#include <cstdlib>
#include <limits>

#include "self_similarity_attention/kernel.h"
#include "simd.h"

namespace zs3fast::self_similarity_attention {
namespace {

inline int64_t round_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

float* take(float*& scratch, int64_t floats) {
  float* p = scratch;
  scratch += (floats + 15) / 16 * 16;
  return p;
}

int64_t scratch_floats(const Problem& f) {
  const int64_t C = kQueryBlock, D = round_up(f.width);
  const int64_t prior = f.rows == nullptr ? 0 : (f.grid_h + f.grid_w) * C;
  return f.streams * (f.width * C + C * D + 2 * C) + kKeyBlock * D + kKeyBlock * C + C + prior + 16 * 16;
}

// The scores of a tile become exp(score - largest): two passes down each vector of queries.
template <bool kPrior>
void softmax_tile(const Problem& f, int64_t n0, int64_t n, int64_t C, float* scores, const float* by_row,
                  const float* by_column, float* largest, float* total, float* shrink) {
  for (int64_t c = 0; c < C; c += kLanes) {
    float* column = scores + c;
    const Float before = load(largest + c);
    Float now = before;
    if constexpr (kPrior) {
      const int64_t start = n0 < f.prefix ? (f.prefix - n0 < n ? f.prefix - n0 : n) : 0;
      for (int64_t i = 0; i < start; ++i) {
        const Float s = load(column + i * C);
        now = s > now ? s : now;
      }
      const int64_t patch = n0 + start - f.prefix;
      int64_t y = patch / f.grid_w, x = patch % f.grid_w;
      for (int64_t i = start; i < n; ++y, x = 0) {
        const Float row = load(by_row + y * C + c);
        for (; x < f.grid_w && i < n; ++x, ++i) {
          const Float s = load(column + i * C) + row * load(by_column + x * C + c);
          store(column + i * C, s);
          now = s > now ? s : now;
        }
      }
    } else {
      for (int64_t i = 0; i < n; ++i) {
        const Float s = load(column + i * C);
        now = s > now ? s : now;
      }
    }
    const Float factor = exponential(before - now);
    Float sum = load(total + c) * factor;
    for (int64_t i = 0; i < n; ++i) {
      const Float p = exponential(load(column + i * C) - now);
      sum += p;
      store(column + i * C, p);
    }
    store(largest + c, now);
    store(total + c, sum);
    store(shrink + c, factor);
  }
}

void forward(const Problem& f, int64_t b, int64_t h, int64_t first, int64_t end, float* scratch) {
  const int64_t dh = f.width, M = end - first, C = round_up(M), D = round_up(dh);
  float* q = take(scratch, f.streams * dh * C);         // [streams, dh, C], scaled
  float* out = take(scratch, f.streams * C * D);        // [streams, C, D]
  float* largest = take(scratch, f.streams * C);        // [streams, C]
  float* total = take(scratch, f.streams * C);          // [streams, C]
  float* v = take(scratch, kKeyBlock * D);              // [n, D]
  float* scores = take(scratch, kKeyBlock * C);         // [n, C], later the probabilities
  float* shrink = take(scratch, C);
  float *by_row = nullptr, *by_column = nullptr;        // [h, C], [w, C]
  if (f.rows != nullptr) {
    by_row = take(scratch, f.grid_h * C);
    by_column = take(scratch, f.grid_w * C);
    for (int64_t c = 0; c < C; ++c) {
      const int64_t patch = first + (c < M ? c : M - 1), y = patch / f.grid_w, x = patch % f.grid_w;
      for (int64_t i = 0; i < f.grid_h; ++i) by_row[i * C + c] = f.rows[std::abs(y - i)];
      for (int64_t i = 0; i < f.grid_w; ++i) by_column[i * C + c] = f.columns[std::abs(x - i)];
    }
  }
  for (int64_t s = 0; s < f.streams; ++s) {
    const Heads<const float>& left = f.left[s];
    const float* from = left.at(b, h) + (f.prefix + first) * left.row;
    float* to = q + s * dh * C;
    for (int64_t j = 0; j < dh; ++j) {
      for (int64_t i = 0; i < M; ++i) to[j * C + i] = from[i * left.row + j * left.column] * f.scale;
      for (int64_t i = M; i < C; ++i) to[j * C + i] = 0.0f;
    }
  }
  for (int64_t i = 0; i < f.streams * C; ++i) {
    largest[i] = -std::numeric_limits<float>::infinity();
    total[i] = 0.0f;
  }

  for (int64_t n0 = 0; n0 < f.tokens; n0 += kKeyBlock) {
    const int64_t n = n0 + kKeyBlock < f.tokens ? kKeyBlock : f.tokens - n0;
    const float* from = f.v.at(b, h) + n0 * f.v.row;
    for (int64_t i = 0; i < n; ++i, from += f.v.row) {
      for (int64_t j = 0; j < dh; ++j) v[i * D + j] = from[j * f.v.column];
      for (int64_t j = dh; j < D; ++j) v[i * D + j] = 0.0f;
    }
    for (int64_t s = 0; s < f.streams; ++s) {
      const Heads<const float>& right = f.right[s];
      gemm(n, C, dh, right.at(b, h) + n0 * right.row, right.row, right.column, q + s * dh * C, C, scores, C, false);
      const auto softmax = by_row == nullptr ? softmax_tile<false> : softmax_tile<true>;
      softmax(f, n0, n, C, scores, by_row, by_column, largest + s * C, total + s * C, shrink);
      float* o = out + s * C * D;
      if (n0 > 0)
        for (int64_t c = 0; c < M; ++c)
          for (int64_t d = 0; d < D; d += kLanes) store(o + c * D + d, load(o + c * D + d) * shrink[c]);
      gemm(M, D, n, scores, 1, C, v, D, o, D, n0 > 0);
    }
  }

  for (int64_t c = 0; c < M; ++c) {
    float* to = f.output.at(b, h) + (first + c) * f.output.row;
    const float one = 1.0f / total[c];
    if (f.streams == 1) {
      for (int64_t d = 0; d < dh; ++d) to[d * f.output.column] = out[c * D + d] * one;
    } else {
      const float two = 1.0f / total[C + c];
      for (int64_t d = 0; d < dh; ++d) to[d * f.output.column] = out[c * D + d] * one + out[(C + c) * D + d] * two;
    }
  }
}

}  // namespace

const Kernels ZS3FAST_ISA = {scratch_floats, forward};

}  // namespace zs3fast::self_similarity_attention
