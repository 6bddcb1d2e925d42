// Products of bfloat16 with float32 sums, by vdpbf16ps: two multiply-adds a lane and instruction. See dots.h.
#pragma once

#include "dots.h"

namespace zs3fast {
namespace {

struct Bf16Dot {
  using Left = uint16_t;
  using Right = uint16_t;
  using Sum = float;
  using Vector = __m512;
  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector load(const float* from) { return _mm512_load_ps(from); }
  static void store(float* to, Vector x) { _mm512_store_ps(to, x); }
  static Vector dot(Vector sum, __m512i left, __m512i right) {
    return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
  }
};
using Dots = UnitProducts<Bf16Dot>;

}  // namespace
}  // namespace zs3fast
