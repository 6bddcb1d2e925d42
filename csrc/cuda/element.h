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

ZS3FAST_HD float read(const void* data, Element element, int64_t index) {
  switch (element) {
    case Element::float32: return static_cast<const float*>(data)[index];
    case Element::float16: return to_float(static_cast<const Half*>(data)[index]);
    default: return to_float(static_cast<const BFloat16*>(data)[index]);
  }
}

}  // namespace zs3fast::cuda
