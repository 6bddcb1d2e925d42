// The pieces of arithmetic on vectors that the kernel needs.
#pragma once

#if defined(__SSE2__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says it of its own _mm512_undefined_epi32
#endif
#include <immintrin.h>
#endif

#include "vectors.h"

namespace zs3fast::proposals_to_labels {
namespace {

constexpr int kGroup = 6;  // classes of a product's tile
#if defined(__AVX512F__)
constexpr int kVectors = 4;  // 24 accumulators, 4 of masks, 1 weight: 29 of 32 registers
#else
constexpr int kVectors = 2;  // 12 accumulators, 2 of masks, 1 weight: 15 of 16 registers
#endif
constexpr float kInf = __builtin_inff();

// a < b ? a : b and a > b ? a : b, so b where either is NaN.
inline Float min(Float a, Float b) {
#if defined(__AVX512F__)
  return (Float)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Float)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
inline Float max(Float a, Float b) {
#if defined(__AVX512F__)
  return (Float)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Float)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
inline Float mix(Float a, Float b, Float weight) { return a * (1.0f - weight) + b * weight; }

inline int64_t round_up(int64_t n, int64_t to = kLanes) { return (n + to - 1) / to * to; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// from[index] for indices below 2 * kLanes; all of from[0, 2 * kLanes) must be readable.
inline Float select(const float* from, Int index) {
#if defined(__AVX512F__)
  return (Float)_mm512_permutex2var_ps((__m512)load(from), (__m512i)index, (__m512)load(from + kLanes));
#elif defined(__AVX2__)
  const Float low = (Float)_mm256_permutevar8x32_ps((__m256)load(from), (__m256i)index);
  const Float high = (Float)_mm256_permutevar8x32_ps((__m256)load(from + kLanes), (__m256i)index);
  return index < kLanes ? low : high;
#else
  Float x;
  for (int i = 0; i < kLanes; ++i) x[i] = from[index[i]];
  return x;
#endif
}

// from[index] for any indices.
inline Float gather(const float* from, Int index) {
  Float x;
  for (int i = 0; i < kLanes; ++i) x[i] = from[index[i]];
  return x;
}

inline float least_of(Float x) {
  float least = x[0];
  for (int i = 1; i < kLanes; ++i) least = x[i] < least ? x[i] : least;
  return least;
}
inline float greatest_of(Float x) { return -least_of(-x); }

// 1 / (1 + e^-x) as 1 / (1 + 2^n 2^f): as exact as the rounding of x allows; 0 below -88, NaN stays NaN.
inline Float sigmoid(Float x) {
  const Float y = max(all(-126.0f), min(all(128.0f), x * -1.44269504f));
  const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer and leaves that in the low bits
  const Float shifted = y + shifter;
  const Float f = y - (shifted - shifter);  // -0.5 ... 0.5
  Float p = all(1.54653125e-4f);
  p = p * f + 1.33952798e-3f;
  p = p * f + 9.61803995e-3f;
  p = p * f + 5.55034068e-2f;
  p = p * f + 2.40226511e-1f;
  p = p * f + 6.93147200e-1f;
  p = p * f + 1.0f;
  return 1.0f / (1.0f + p * (Float)(((Int)shifted - 0x4B400000 + 127) << 23));
}

}  // namespace
}  // namespace zs3fast::proposals_to_labels
