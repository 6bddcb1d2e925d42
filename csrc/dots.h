// C [rows, kBlock] (+)= A [rows, depth] B by instructions that multiply units of 32 bits, pairs of bfloat16 or fours of
// int8, and add what a unit gives to a lane: A in rows, B in units [depth / kPer, kBlock, kPer]. depth is a multiple of
// kPer, and C's and B's rows are aligned.
#pragma once

#include <cstring>

#include "avx512.h"

namespace zs3fast {
namespace {

template <class Dot>
struct UnitProducts {
  using Left = typename Dot::Left;
  using Right = typename Dot::Right;
  using Sum = typename Dot::Sum;
  static constexpr int64_t kPer = 4 / sizeof(Left);  // elements of a unit

  static void begin() {}
  static void end() {}
  // The first `columns` of B and C, rounded up to a vector.
  static void multiply(int64_t rows, int64_t depth, const Left* a, int64_t lda, const Right* b, Sum* c, bool accumulate,
                       int64_t columns = kBlock) {
    if (columns > 32) return panel<6, 4>(rows, depth, a, lda, b, c, accumulate);
    if (columns > 16) return panel<12, 2>(rows, depth, a, lda, b, c, accumulate);
    panel<16, 1>(rows, depth, a, lda, b, c, accumulate);
  }

 private:
  template <int R, int V>
  static void panel(int64_t rows, int64_t depth, const Left* a, int64_t lda, const Right* b, Sum* c, bool accumulate) {
    int64_t i = 0;
    for (; i + R <= rows; i += R) tile<R, V>(depth, a + i * lda, lda, b, c + i * kBlock, accumulate);
    for (; i + 4 <= rows; i += 4) tile<4, V>(depth, a + i * lda, lda, b, c + i * kBlock, accumulate);
    for (; i < rows; ++i) tile<1, V>(depth, a + i * lda, lda, b, c + i * kBlock, accumulate);
  }

  template <int R, int V>
  static void tile(int64_t depth, const Left* a, int64_t lda, const Right* b, Sum* c, bool accumulate) {
    typename Dot::Vector sum[R][V];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) sum[i][j] = accumulate ? Dot::load(c + i * kBlock + 16 * j) : Dot::zero();
    for (int64_t k = 0; k < depth; k += kPer) {
      __m512i right[V];
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) right[j] = _mm512_load_si512(b + k * kBlock + kPer * 16 * j);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        int unit;
        std::memcpy(&unit, a + i * lda + k, sizeof unit);
        const __m512i left = _mm512_set1_epi32(unit);
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) sum[i][j] = Dot::dot(sum[i][j], left, right[j]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) Dot::store(c + i * kBlock + 16 * j, sum[i][j]);
  }
};

}  // namespace
}  // namespace zs3fast
