// The end of a linear layer, for AVX-512: bias and activation of sums that lie turned over, residual, and the store.
#pragma once

#include <algorithm>
#include <cstdint>

#include "activation.h"
#include "avx512.h"
#include "bfloat16.h"

namespace zs3fast {
namespace {  // every translation unit has its own: their instructions differ

// 1 - erf(x) for x >= 0, to 1.5e-7 (Abramowitz and Stegun 7.1.26).
inline __m512 erfc_positive(__m512 x) {
  const auto all = [](float c) { return _mm512_set1_ps(c); };
  const __m512 t = _mm512_div_ps(all(1.0f), _mm512_fmadd_ps(x, all(0.3275911f), all(1.0f)));
  __m512 p = all(1.061405429f);
  for (const float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = _mm512_fmadd_ps(p, t, all(c));
  return _mm512_mul_ps(_mm512_mul_ps(p, t), exp2_512<false>(_mm512_mul_ps(_mm512_mul_ps(x, x), all(-1.44269504f))));
}

template <Activation A>
inline __m512 activate(__m512 x) {
  const auto all = [](float c) { return _mm512_set1_ps(c); };
  if constexpr (A == Activation::quick_gelu) {  // x / (1 + e^(-1.702 x)); e^(...) may be infinite
    return _mm512_div_ps(x, _mm512_add_ps(all(1.0f), exp2_512<false>(_mm512_mul_ps(x, all(-1.702f * 1.44269504f)))));
  } else if constexpr (A == Activation::gelu) {  // x (1 + erf(x / sqrt 2)) / 2
    const __m512 tail = erfc_positive(_mm512_mul_ps(_mm512_abs_ps(x), all(0.707106781f)));
    const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    const __m512 twice = _mm512_mask_mov_ps(_mm512_sub_ps(all(2.0f), tail), negative, tail);
    return _mm512_mul_ps(_mm512_mul_ps(x, all(0.5f)), twice);
  } else if constexpr (A == Activation::relu) {
    return _mm512_max_ps(_mm512_setzero_ps(), x);  // in this order NaN stays NaN
  } else {
    return x;
  }
}

// A panel of outputs from `first` on, a block of rows from `row` on -> out. `sums(j, i)` are 16 rows from i on of output j
// of the panel: bias and activation while they are a vector, which is then turned over.
template <Activation A, class T, class Problem, class Sums>
void finish_with(const Problem& f, const Sums& sums, int64_t first, int64_t outputs, int64_t row, int64_t rows) {
  const T* bias = static_cast<const T*>(f.bias);
  for (int64_t j = 0; j < outputs; j += 16)
    for (int64_t i = 0; i < rows; i += 16) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int64_t n = 0; n < 16; ++n) {
        const __m512 shift = _mm512_set1_ps(bias ? widen(bias[first + j + n]) : 0.0f);
        r[n] = _mm512_castps_si512(activate<A>(_mm512_add_ps(sums(j + n, i), shift)));
      }
      transpose16(r);
      const int64_t here = std::min<int64_t>(16, rows - i);
      for (int64_t n = 0; n < here; ++n) {
        __m512 x = _mm512_castsi512_ps(r[n]);
        const int64_t at = row + i + n, column = first + j;
        if (f.residual)
          x = _mm512_add_ps(x, widen16(static_cast<const T*>(f.residual) + at * f.residual_stride + column, 0xFFFF));
        store16(static_cast<T*>(f.out) + at * f.out_stride + column, x, 0xFFFF);
      }
    }
}

template <class T, class Problem, class Sums>
void finish(const Problem& f, const Sums& sums, int64_t first, int64_t outputs, int64_t row, int64_t rows) {
  switch (f.activation) {
    case Activation::quick_gelu: return finish_with<Activation::quick_gelu, T>(f, sums, first, outputs, row, rows);
    case Activation::gelu: return finish_with<Activation::gelu, T>(f, sums, first, outputs, row, rows);
    case Activation::relu: return finish_with<Activation::relu, T>(f, sums, first, outputs, row, rows);
    default: return finish_with<Activation::none, T>(f, sums, first, outputs, row, rows);
  }
}

}  // namespace
}  // namespace zs3fast
