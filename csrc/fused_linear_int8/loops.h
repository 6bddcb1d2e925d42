// The loops of fused_linear_int8, for AVX-512 with VNNI; what multiplies is `Products`, which see.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

#include "avx512.h"
#include "epilogue.h"
#include "fused_linear_int8/kernel.h"

namespace zs3fast::fused_linear_int8 {
namespace {

static_assert(kRows == kBlock);
constexpr int64_t kDepth = 512;  // of a step: a block of x of this depth stays in the first cache

struct RowScale {
  float scale, inverse;
  int32_t zero;
};

// Every step is that of `quantize_rows` in zs3fast/ops/fused_linear_int8.py, rounding for rounding.
template <class T>
RowScale scale_of(const T* x, int64_t depth) {
  __m512 low[4], high[4];
  for (int64_t part = 0; part < 4; ++part) low[part] = high[part] = _mm512_setzero_ps();
  __mmask16 nan = 0;
  for (int64_t k = 0; k < depth; k += 64)
#pragma GCC unroll 4
    for (int64_t part = 0; part < 4; ++part) {
      const __m512 v = widen16(x + k + 16 * part, 0xFFFF);
      low[part] = _mm512_min_ps(low[part], v);
      high[part] = _mm512_max_ps(high[part], v);
      nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    }
  for (int64_t part = 1; part < 4; ++part) {
    low[0] = _mm512_min_ps(low[0], low[part]);
    high[0] = _mm512_max_ps(high[0], high[part]);
  }
  const float least = _mm512_reduce_min_ps(low[0]), most = _mm512_reduce_max_ps(high[0]);
  float scale = std::max((most - least) * (1.0f / 255), std::numeric_limits<float>::min());
  const float inverse = 1 / scale;
  const int32_t zero = _mm512_cvtsi512_si32(_mm512_cvtps_epi32(_mm512_set1_ps(-least * inverse)));
  if (nan || scale > std::numeric_limits<float>::max()) scale = std::numeric_limits<float>::quiet_NaN();
  return {scale, inverse, zero};
}

template <class T>
void pack_blocks(const Problem& f, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    uint8_t* packed = f.packed + block * block_bytes(f.depth);
    float* scales = reinterpret_cast<float*>(packed + kRows * f.depth);
    int32_t* zeros = reinterpret_cast<int32_t*>(scales + kRows);
    for (int64_t i = 0; i < kRows; i += 16) {
      const int64_t first = block * kRows + i, count = std::clamp<int64_t>(f.rows - first, 0, 16);
      const T* x = static_cast<const T*>(f.x) + first * f.x_stride;
      RowScale rows[16] = {};
      for (int64_t n = 0; n < count; ++n) rows[n] = scale_of(x + n * f.x_stride, f.depth);
      for (int64_t n = 0; n < 16; ++n) {
        scales[i + n] = rows[n].scale;
        zeros[i + n] = rows[n].zero;
      }
      for (int64_t k = 0; k < f.depth; k += 64) {
        __m512i r[16];
        for (int64_t n = 0; n < 16; ++n) {
          r[n] = _mm512_setzero_si512();
          if (n >= count) continue;
          const __m512 inverse = _mm512_set1_ps(rows[n].inverse);
          const __m512i zero = _mm512_set1_epi32(rows[n].zero);
          __m512i q[4];  // 256 becomes 255 when it is narrowed
#pragma GCC unroll 4
          for (int64_t part = 0; part < 4; ++part) {
            const __m512 v = _mm512_mul_ps(widen16(x + n * f.x_stride + k + 16 * part, 0xFFFF), inverse);
            q[part] = _mm512_add_epi32(_mm512_cvtps_epi32(v), zero);
          }
          // unit 4 l + part of these bytes is unit 4 part + l of the row
          r[n] = _mm512_packus_epi16(_mm512_packus_epi32(q[0], q[1]), _mm512_packus_epi32(q[2], q[3]));
        }
        transpose16(r);
#pragma GCC unroll 16
        for (int64_t n = 0; n < 16; ++n)
          _mm512_store_si512(packed + (k + 4 * (n % 4 * 4 + n / 4)) * kBlock + 4 * i, r[n]);
      }
    }
  }
}

inline int32_t sum_of(const int8_t* w, int64_t depth) {
  __m512i sum = _mm512_setzero_si512();
  for (int64_t k = 0; k < depth; k += 64)
    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(w + k));
  return _mm512_reduce_add_epi32(sum);
}

template <class Products, class T>
void run_tasks(const Problem& f, int64_t begin, int64_t end) {
  const int64_t count = blocks(f.rows);
  const std::unique_ptr<int32_t, void (*)(void*)> room(
      static_cast<int32_t*>(std::aligned_alloc(64, kOutputs * kBlock * sizeof(int32_t))), std::free);
  if (!room) throw std::bad_alloc();
  int32_t* sums = room.get();
  int32_t weight_sums[kOutputs];
  int64_t known = -1;  // whose sums these are
  Products::begin();
  for (int64_t task = begin; task < end; ++task) {  // neighbours share their panel, which stays in the second cache
    const int64_t first = task / count * kOutputs, block = task % count;
    const int64_t outputs = std::min(kOutputs, f.outputs - first), rows = std::min(kRows, f.rows - block * kRows);
    const int8_t* w = f.weight + first * f.weight_stride;
    if (known != first) {
      for (int64_t j = 0; j < outputs; ++j) weight_sums[j] = sum_of(w + j * f.weight_stride, f.depth);
      known = first;
    }
    const uint8_t* x = f.packed + block * block_bytes(f.depth);
    for (int64_t k = 0; k < f.depth; k += kDepth)
      Products::multiply(outputs, std::min(kDepth, f.depth - k), w + k, f.weight_stride, x + k * kBlock, sums, k > 0, rows);
    const float* scales = reinterpret_cast<const float*>(x + kRows * f.depth);
    const int32_t* zeros = reinterpret_cast<const int32_t*>(scales + kRows);
    const auto value = [&](int64_t j, int64_t i) {
      const __m512i shift = _mm512_mullo_epi32(_mm512_load_si512(zeros + i), _mm512_set1_epi32(weight_sums[j]));
      const __m512i sum = _mm512_sub_epi32(_mm512_load_si512(sums + j * kBlock + i), shift);
      const __m512 scale = _mm512_mul_ps(_mm512_load_ps(scales + i), _mm512_set1_ps(f.scale[first + j]));
      return _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale);
    };
    finish<T>(f, value, first, outputs, block * kRows, rows);
  }
  Products::end();
}

}  // namespace
}  // namespace zs3fast::fused_linear_int8
