// By vdpbf16ps: two multiply-adds a lane and instruction.
#include "encoder_attention/pairs.h"

namespace zs3fast::encoder_attention {
namespace {

template <int R>
inline void dot_tile(int64_t depth, const uint16_t* a, int64_t lda, const uint16_t* b, float* c, bool accumulate) {
  __m512 sum[R][4];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[i][j] = accumulate ? _mm512_load_ps(c + i * kQueries + 16 * j) : _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; k += 2) {
    __m512bh right[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) right[j] = (__m512bh)_mm512_load_si512(b + k * kQueries + 32 * j);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(pair_at(a + i * lda + k)));
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) _mm512_store_ps(c + i * kQueries + 16 * j, sum[i][j]);
}

void multiply(int64_t rows, int64_t depth, const uint16_t* a, int64_t lda, const uint16_t* b, float* c,
              bool accumulate) {
  int64_t i = 0;
  for (; i + 6 <= rows; i += 6) dot_tile<6>(depth, a + i * lda, lda, b, c + i * kQueries, accumulate);
  for (; i + 4 <= rows; i += 4) dot_tile<4>(depth, a + i * lda, lda, b, c + i * kQueries, accumulate);
  for (; i < rows; i += 2) dot_tile<2>(depth, a + i * lda, lda, b, c + i * kQueries, accumulate);  // rows are even
}

struct DotProducts : PairOperands {
  static void begin() {}
  static void end() {}
  static void scores(int64_t keys, int64_t width, const uint16_t* k, const uint16_t* q, float* s) {
    multiply(keys, width, k, width, q, s, false);
  }
  static void values(int64_t keys, int64_t width, int64_t stride, const uint16_t* v, const uint16_t* p, float* o) {
    multiply(width, keys, v, stride, p, o, true);
  }
};

}  // namespace

const Kernel kernel_avx512_bf16{"avx512_bf16", true, tasks_of, run_tasks<DotProducts>};

}  // namespace zs3fast::encoder_attention
