// What the products of bfloat16 pairs share: how their operands lie.
#pragma once

#include "encoder_attention/kernel_impl.h"

namespace zs3fast::encoder_attention {
namespace {

inline uint32_t pair_at(const uint16_t* x) {
  uint32_t pair;
  std::memcpy(&pair, x, sizeof pair);
  return pair;
}

// C [M, kQueries] = A [M, K] B [K, kQueries], with A in rows of bfloat16 and B in pairs: [K / 2, kQueries, 2].
struct PairOperands {
  using Packed = uint16_t;
  static constexpr int64_t kDepth = 32, kGroup = 32;  // a tile of A holds 32 columns
  static constexpr bool kShort = true;

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
    for (int64_t i = 0; i < padded; i += 2) {
      const T* a = i < count ? v + i * v_stride : nullptr;
      const T* b = i + 1 < count ? v + (i + 1) * v_stride : nullptr;
      for (int64_t d = 0; d < width; ++d) {
        const uint32_t low = a && d < dh ? a[d] : 0, high = b && d < dh ? b[d] : 0, pair = low | high << 16;
        std::memcpy(packed_v + d * keys + i, &pair, sizeof pair);
      }
    }
  }
  template <class T>
  static void pack_queries(const T* q, int64_t stride, int64_t count, int64_t dh, int64_t width, bool negate,
                           uint16_t* packed) {
    const uint32_t sign = negate ? 0x8000u : 0u;
    for (int64_t i = 0; i < kQueries; ++i)
      for (int64_t d = 0; d < width; d += 2) {
        const uint32_t low = i < count && d < dh ? q[i * stride + d] ^ sign : 0;
        const uint32_t high = i < count && d + 1 < dh ? q[i * stride + d + 1] ^ sign : 0;
        const uint32_t pair = low | high << 16;
        std::memcpy(packed + d * kQueries + 2 * i, &pair, sizeof pair);
      }
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
