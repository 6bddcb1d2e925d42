// What AVX-512 kernels share: 2^x, blocks of 32-bit units turned over, and bfloat16's rows and pairs.
#pragma once

#include <immintrin.h>
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 warns of its own header

#include <cstdint>

namespace zs3fast {
namespace {  // every translation unit has its own: their instructions differ

constexpr int64_t kBlock = 64;  // columns of a product: four vectors

// 16 x 16 units of 32 bits, in registers: row i, unit j becomes row j, unit i.
inline void transpose16(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Rows of 32-bit units, `stride` bytes apart, become columns: to[unit * kBlock + row], absent rows zero.
inline void pack_columns(const void* from, int64_t stride, int64_t rows, int64_t units, uint32_t* to) {
  const auto* data = static_cast<const unsigned char*>(from);
  for (int64_t j = 0; j < units; j += 16) {
    const int64_t left = units - j;
    const __mmask16 mask = left >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << left) - 1);
    for (int64_t i = 0; i < kBlock; i += 16) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int64_t n = 0; n < 16; ++n)
        r[n] = i + n < rows ? _mm512_maskz_loadu_epi32(mask, data + (i + n) * stride + 4 * j) : _mm512_setzero_si512();
      transpose16(r);
      for (int64_t n = 0; n < 16 && n < left; ++n) _mm512_store_si512(to + (j + n) * kBlock + i, r[n]);
    }
  }
}

// 2^x, for any x: fraction and whole part by one instruction each. Short: 3e-6; else less than a rounding.
template <bool Short>
inline __m512 exp2_512(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, 0x09);  // x - floor(x), in [0, 1)
  __m512 p;
  const auto step = [&](float c) { p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c)); };
  if constexpr (Short) {
    p = _mm512_set1_ps(1.342668861e-2f);
    step(5.224246716e-2f);
    step(2.412802081e-1f);
    step(6.930448445e-1f);
  } else {
    p = _mm512_set1_ps(2.161291988e-4f);
    step(1.246784514e-3f);
    step(9.675451694e-3f);
    step(5.548528056e-2f);
    step(2.402293056e-1f);
    step(6.931470444e-1f);
  }
  step(1.0f);
  return _mm512_scalef_ps(p, x);  // p 2^floor(x)
}

// 16 elements, or those of the mask: float32 in registers, float32 or bfloat16 in memory.
inline __m512 widen16(const uint16_t* x, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16));
}
inline __m512 widen16(const float* x, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, x); }
inline void store16(float* to, __m512 x, __mmask16 mask) { _mm512_mask_storeu_ps(to, mask, x); }
inline void store16(uint16_t* to, __m512 x, __mmask16 mask) {
#if defined(__AVX512BF16__)
  const __m256i narrow = (__m256i)_mm512_cvtneps_pbh(x);
#else
  const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));  // NaN stays one
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m256i narrow = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
#endif
  _mm256_mask_storeu_epi16(to, mask, narrow);
}
inline __mmask16 first16(int64_t count) { return count >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << count) - 1); }

}  // namespace
}  // namespace zs3fast
