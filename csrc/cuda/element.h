// Floats of three widths, read as fp32. The type of a tensor is a value (Element), not a template parameter, where
// reads are few beside the arithmetic: one kernel instead of three.
#pragma once

#include "cuda/host_device.h"

namespace zs3fast::cuda {

enum class Element : int32_t { float32, float16, bfloat16 };

// The 16 bits of a half-precision number, in memory as torch has them.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

ZS3FAST_HD float to_float(float x) { return x; }
ZS3FAST_HD float to_float(BFloat16 x) { return bits_as<float>(static_cast<uint32_t>(x.bits) << 16); }
ZS3FAST_HD float to_float(Half x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_as<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // infinity, NaN
  const float size = rest < 0x400u ? rest * 0x1p-24f : bits_as<float>((rest << 13) + (112u << 23));
  return bits_as<float>(sign | bits_as<uint32_t>(size));
#endif
}

// Rounds to nearest, ties to even; NaN stays NaN.
template <class T>
ZS3FAST_HD T from_float(float x);
template <>
ZS3FAST_HD float from_float<float>(float x) {
  return x;
}
template <>
ZS3FAST_HD BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
ZS3FAST_HD Half from_float<Half>(float x) {
#if defined(__CUDA_ARCH__)
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return {bits};
#else
  const uint32_t all = bits_as<uint32_t>(x), sign = all >> 16 & 0x8000u, rest = all & 0x7fffffffu;
  if (rest > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (rest >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 rounds to infinity
  if (rest < 0x38800000u) {  // subnormal: adding 1/2 leaves the steps of 2^-24 in the lowest bits, rounded
    return {static_cast<uint16_t>(sign | (bits_as<uint32_t>(bits_as<float>(rest) + 0.5f) - 0x3f000000u))};
  }
  return {static_cast<uint16_t>(sign | (rest - (112u << 23) + 0xfffu + (rest >> 13 & 1u)) >> 13)};
#endif
}

ZS3FAST_HD float read(const void* data, Element element, int64_t index) {
  switch (element) {
    case Element::float32: return static_cast<const float*>(data)[index];
    case Element::float16: return to_float(static_cast<const Half*>(data)[index]);
    default: return to_float(static_cast<const BFloat16*>(data)[index]);
  }
}

ZS3FAST_HD void write(void* data, Element element, int64_t index, float x) {
  switch (element) {
    case Element::float32: static_cast<float*>(data)[index] = x; break;
    case Element::float16: static_cast<Half*>(data)[index] = from_float<Half>(x); break;
    default: static_cast<BFloat16*>(data)[index] = from_float<BFloat16>(x);
  }
}

}  // namespace zs3fast::cuda
