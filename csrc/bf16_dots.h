// C [rows, kBlock] (+)= A [rows, depth] B, A in rows of bfloat16, B in pairs [depth / 2, kBlock, 2]: by vdpbf16ps, two
// multiply-adds a lane and instruction. depth is even, and C's and B's rows are aligned.
#pragma once

#include <cstring>

#include "avx512.h"

namespace zs3fast {
namespace {

template <int R, int V>
inline void dot_tile(int64_t depth, const uint16_t* a, int64_t lda, const uint16_t* b, float* c, bool accumulate) {
  __m512 sum[R][V];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) sum[i][j] = accumulate ? _mm512_load_ps(c + i * kBlock + 16 * j) : _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; k += 2) {
    __m512bh right[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) right[j] = (__m512bh)_mm512_load_si512(b + k * kBlock + 32 * j);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      int pair;
      std::memcpy(&pair, a + i * lda + k, sizeof pair);
      const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) _mm512_store_ps(c + i * kBlock + 16 * j, sum[i][j]);
}

struct Dots {
  static void begin() {}
  static void end() {}
  // The first `columns` of B and C, rounded up to a vector.
  static void multiply(int64_t rows, int64_t depth, const uint16_t* a, int64_t lda, const uint16_t* b, float* c,
                       bool accumulate, int64_t columns = kBlock) {
    if (columns > 32) return panel<6, 4>(rows, depth, a, lda, b, c, accumulate);
    if (columns > 16) return panel<12, 2>(rows, depth, a, lda, b, c, accumulate);
    panel<16, 1>(rows, depth, a, lda, b, c, accumulate);
  }

 private:
  template <int R, int V>
  static void panel(int64_t rows, int64_t depth, const uint16_t* a, int64_t lda, const uint16_t* b, float* c,
                    bool accumulate) {
    int64_t i = 0;
    for (; i + R <= rows; i += R) dot_tile<R, V>(depth, a + i * lda, lda, b, c + i * kBlock, accumulate);
    for (; i + 4 <= rows; i += 4) dot_tile<4, V>(depth, a + i * lda, lda, b, c + i * kBlock, accumulate);
    for (; i < rows; ++i) dot_tile<1, V>(depth, a + i * lda, lda, b, c + i * kBlock, accumulate);
  }
};

}  // namespace
}  // namespace zs3fast
