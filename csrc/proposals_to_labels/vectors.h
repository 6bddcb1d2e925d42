// Vectors of floats on each instruction set, and the pieces of arithmetic the kernel needs on them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says it of its own _mm512_undefined_epi32
#endif
#include <immintrin.h>
#endif

namespace zs3fast::proposals_to_labels {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64, kGroup = 6, kVectors = 4;  // 24 accumulators, 4 of masks, 1 weight: 29 of 32 registers
#elif defined(__AVX2__)
constexpr int kBytes = 32, kGroup = 6, kVectors = 2;  // 12 accumulators, 2 of masks, 1 weight: 15 of 16 registers
#else
constexpr int kBytes = 16, kGroup = 6, kVectors = 2;
#endif
constexpr int kLanes = kBytes / 4;
constexpr float kInf = __builtin_inff();

typedef float Float __attribute__((vector_size(kBytes)));
typedef int32_t Int __attribute__((vector_size(kBytes)));

inline Float load(const float* p) {
  Float x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline Int load(const int32_t* p) {
  Int x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
template <typename Vector, typename T>
inline void store(T* p, Vector x) {
  std::memcpy(p, &x, sizeof x);
}
inline Float all(float x) { return x - Float{}; }
inline Int all(int32_t x) { return x - Int{}; }
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

// Hands out pieces of one block of scratch memory, each on its own cache lines; with a null block it only measures.
class Carver {
 public:
  explicit Carver(unsigned char* block) : block_(block) {}
  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(block_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  unsigned char* block_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace zs3fast::proposals_to_labels
