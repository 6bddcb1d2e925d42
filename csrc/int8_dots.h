// Products of int8 from the left and uint8 from the right with int32 sums, by vpdpbusd: four multiply-adds a lane and
// instruction, none of which saturates. See dots.h.
#pragma once

#include "dots.h"

namespace zs3fast {
namespace {

struct Int8Dot {
  using Left = int8_t;
  using Right = uint8_t;
  using Sum = int32_t;
  using Vector = __m512i;
  static Vector zero() { return _mm512_setzero_si512(); }
  static Vector load(const int32_t* from) { return _mm512_load_si512(from); }
  static void store(int32_t* to, Vector x) { _mm512_store_si512(to, x); }
  static Vector dot(Vector sum, __m512i left, __m512i right) { return _mm512_dpbusd_epi32(sum, right, left); }
};
using Int8Dots = UnitProducts<Int8Dot>;

}  // namespace
}  // namespace zs3fast
