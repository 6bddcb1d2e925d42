// What the products of bfloat16 pairs share: how their operands lie.
#pragma once

#include "avx512.h"
#include "encoder_attention/kernel_impl.h"

namespace zs3fast::encoder_attention {
namespace {

static_assert(kBlock == kQueries);

// Products of bfloat16: `Multiply` is Dots, or TileProducts.
template <class Multiply>
struct PairProducts {
  using Packed = uint16_t;
  static constexpr int64_t kDepth = 32, kGroup = 32;  // a tile of A holds 32 columns
  static constexpr bool kShort = true;
  static void begin() { Multiply::begin(); }
  static void end() { Multiply::end(); }
  static void scores(int64_t keys, int64_t width, const uint16_t* k, const uint16_t* q, float* s,
                     int64_t columns) {
    if constexpr (requires { Multiply::multiply64; })
      if (width == 64) return Multiply::multiply64(keys, k, q, s, columns);
    Multiply::multiply(keys, width, k, width, q, s, false, columns);
  }
  static void values(int64_t keys, int64_t width, int64_t stride, const uint16_t* v, const uint16_t* p, float* o,
                     int64_t columns) {
    Multiply::multiply(width, keys, v, stride, p, o, true, columns);
  }

  // K [keys, width] and V^T [width, all keys], filled up with zeros
  template <class T>
  static void pack(const T* k, int64_t k_stride, const T* v, int64_t v_stride, int64_t count, int64_t padded,
                   int64_t dh, int64_t width, int64_t keys, uint16_t* packed_k, uint16_t* packed_v) {
    const size_t row = static_cast<size_t>(dh) * sizeof(uint16_t), rest = static_cast<size_t>(width - dh) * sizeof(uint16_t);
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(packed_k + i * width, k + i * k_stride, row);
      std::memset(packed_k + i * width + dh, 0, rest);
    }
    std::memset(packed_k + count * width, 0, static_cast<size_t>((padded - count) * width) * sizeof(uint16_t));
    for (int64_t i = 0; i < padded; i += 32)
      for (int64_t d = 0; d < width; d += 16) {  // 16 pairs of keys by 16 columns, turned over
        const __mmask16 mask = d < dh ? first16(dh - d) : 0;
        const auto row = [&](int64_t key) {
          return key < count ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, v + key * v_stride + d))
                             : _mm512_setzero_si512();
        };
        __m512i r[16];
#pragma GCC unroll 16
        for (int64_t n = 0; n < 16; ++n)
          r[n] = _mm512_or_si512(row(i + 2 * n), _mm512_slli_epi32(row(i + 2 * n + 1), 16));
        transpose16(r);
#pragma GCC unroll 16
        for (int64_t n = 0; n < 16; ++n) _mm512_store_si512(packed_v + (d + n) * keys + i, r[n]);
      }
  }
  template <class T>
  static void pack_queries(const T* q, int64_t stride, int64_t count, int64_t dh, int64_t width, bool negate,
                           uint16_t* packed) {
    std::memset(packed, 0, static_cast<size_t>(width * kQueries) * sizeof(uint16_t));
    pack_columns(q, stride * static_cast<int64_t>(sizeof(uint16_t)), count, dh / 2, reinterpret_cast<uint32_t*>(packed));
    if (dh % 2)
      for (int64_t i = 0; i < count; ++i) packed[(dh - 1) * kQueries + 2 * i] = q[i * stride + dh - 1];
    if (negate)
      for (int64_t i = 0; i < width * kQueries; ++i) packed[i] ^= 0x8000;
  }
  static uint16_t* probabilities(float*, float* p) { return reinterpret_cast<uint16_t*>(p); }
  static void store_pair(uint16_t* p, int64_t row, int64_t column, Float first, Float second, bool) {
    // low half of each 32 bits: the first key's
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    alignas(64) static constexpr int16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i pairs = _mm512_permutexvar_epi16(_mm512_load_si512(order), both);
    _mm512_store_si512(p + row * kQueries + 2 * column, pairs);
  }
  static const uint16_t* at_key(const uint16_t* v, int64_t key, int64_t, int64_t) { return v + key; }
};

}  // namespace
}  // namespace zs3fast::encoder_attention
