// The loops of fused_linear, for AVX-512; what multiplies is `Products`, which see.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "avx512.h"
#include "bfloat16.h"
#include "fused_linear/kernel.h"

namespace zs3fast::fused_linear {
namespace {

static_assert(kRows == kBlock);
constexpr int64_t kDepth = 256;  // of a step: a block of x of this depth stays in the first cache

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

// sums [outputs, kBlock] -> out: bias and activation while a vector is 16 rows of one output, then turned over.
template <Activation A, class T>
void finish(const Problem& f, float* sums, int64_t first, int64_t outputs, int64_t row, int64_t rows) {
  const T* bias = static_cast<const T*>(f.bias);
  for (int64_t j = 0; j < outputs; j += 16)
    for (int64_t i = 0; i < rows; i += 16) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int64_t n = 0; n < 16; ++n) {
        const __m512 shift = _mm512_set1_ps(bias ? widen(bias[first + j + n]) : 0.0f);
        r[n] = _mm512_castps_si512(activate<A>(_mm512_add_ps(_mm512_load_ps(sums + (j + n) * kBlock + i), shift)));
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

template <class T>
void pack_blocks(const Problem& f, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const T* x = static_cast<const T*>(f.x) + block * kRows * f.x_stride;
    pack_columns(x, f.x_stride * static_cast<int64_t>(sizeof(T)), std::min(kRows, f.rows - block * kRows),
                 f.depth * static_cast<int64_t>(sizeof(T)) / 4,
                 reinterpret_cast<uint32_t*>(static_cast<T*>(f.packed) + block * kRows * f.depth));
  }
}

template <class Products, class T>
void run_tasks(const Problem& f, int64_t begin, int64_t end) {
  const int64_t count = blocks(f.rows);
  const std::unique_ptr<float, void (*)(void*)> sums(
      static_cast<float*>(std::aligned_alloc(64, kOutputs * kBlock * sizeof(float))), std::free);
  if (!sums) throw std::bad_alloc();
  Products::begin();
  for (int64_t task = begin; task < end; ++task) {  // neighbours share their panel, which stays in the second cache
    const int64_t first = task / count * kOutputs, block = task % count;
    const int64_t outputs = std::min(kOutputs, f.outputs - first), rows = std::min(kRows, f.rows - block * kRows);
    const T* w = static_cast<const T*>(f.weight) + first * f.weight_stride;
    const T* x = static_cast<const T*>(f.packed) + block * kRows * f.depth;
    for (int64_t k = 0; k < f.depth; k += kDepth)
      Products::multiply(outputs, std::min(kDepth, f.depth - k), w + k, f.weight_stride, x + k * kBlock, sums.get(),
                         k > 0, rows);
    switch (f.activation) {
      case Activation::quick_gelu:
        finish<Activation::quick_gelu, T>(f, sums.get(), first, outputs, block * kRows, rows);
        break;
      case Activation::gelu:
        finish<Activation::gelu, T>(f, sums.get(), first, outputs, block * kRows, rows);
        break;
      case Activation::relu:
        finish<Activation::relu, T>(f, sums.get(), first, outputs, block * kRows, rows);
        break;
      default: finish<Activation::none, T>(f, sums.get(), first, outputs, block * kRows, rows);
    }
  }
  Products::end();
}

}  // namespace
}  // namespace zs3fast::fused_linear
