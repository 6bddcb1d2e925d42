// bfloat16 as the 16 bits that it is, beside float: kernels of both types are one template.
#pragma once

#include <cstdint>
#include <cstring>

namespace zs3fast {
namespace {  // every translation unit has its own: their instructions differ

inline float widen(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
inline float widen(float x) { return x; }
inline uint16_t narrow(float x) {  // to the nearest, ties to even; NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40 : rounded);
}
inline void put(float* to, float x) { *to = x; }
inline void put(uint16_t* to, float x) { *to = narrow(x); }

}  // namespace
}  // namespace zs3fast
