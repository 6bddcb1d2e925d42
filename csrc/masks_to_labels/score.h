// Scalar pieces both kernels share, written so that loops over them vectorise. Everything is internal to one file.
#pragma once

#include <cstdint>
#include <cstring>

#include "labels.h"
#include "masks_to_labels/request.h"

namespace zs3fast::masks_to_labels::ZS3FAST_ISA {
namespace {

constexpr float kInf = __builtin_inff();

// What a score can be wrong by, relative to its terms: pruning keeps every class within this of the best.
constexpr float kRounding = 2e-6f;

inline float max(float a, float b) { return a > b ? a : b; }
inline float min(float a, float b) { return a < b ? a : b; }
inline float abs(float a) { return __builtin_fabsf(a); }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename To, typename From>
inline To bits(From from) {
  To to;
  static_assert(sizeof(to) == sizeof(from));
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// e^x to 2 ulp for x in [-87, 88]; below clamped, above soon infinite; NaN stays NaN.
inline float exp(float x) {
  x = x > 89.0f ? 89.0f : x;
  x = x < -87.0f ? -87.0f : x;
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low mantissa bits
  const float shifted = x * 1.44269504f + magic;
  const float n = shifted - magic;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * bits<float>((bits<int32_t>(shifted) - bits<int32_t>(magic) + 127) << 23);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }

// Larger, NaN being the largest: on equality the class that came first stays.
inline bool beats(float a, float b) { return (a > b) | ((a != a) & (b == b)); }

inline float load(const Maps& maps, int64_t index) {
  switch (maps.element) {
    case Element::float32: return static_cast<const float*>(maps.data)[index];
    case Element::bfloat16:
      return bits<float>(static_cast<uint32_t>(static_cast<const uint16_t*>(maps.data)[index]) << 16);
    default: return static_cast<float>(static_cast<const _Float16*>(maps.data)[index]);
  }
}

inline int64_t count_nan(const float* values, int64_t count) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += values[i] != values[i];
  return total;
}

}  // namespace
}  // namespace zs3fast::masks_to_labels::ZS3FAST_ISA
