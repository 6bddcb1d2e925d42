// The loops of encoder_attention, compiled once for each instruction set; what multiplies is a `Products`.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "bfloat16.h"
#include "carver.h"
#include "encoder_attention/kernel.h"
#include "simd.h"
#include "workspace.h"

#if defined(__AVX512F__)
#include "avx512.h"
#endif

namespace zs3fast::encoder_attention {
namespace {

constexpr int64_t kQueries = 64;  // of a block
constexpr int64_t kKeys = 256;    // of a block
constexpr float kLog2e = 1.44269504f;
constexpr float kFar = 65536.0f;  // of exponents: beyond, a product's rounding is more than that of a difference

inline int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

inline Float larger(Float a, Float b) {
#if defined(__AVX512F__)
  return (Float)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// Infinity less infinity is no number: what is minus infinity has nothing taken off it.
inline Float finite_or_zero(Float x) { return x == all(-std::numeric_limits<float>::infinity()) ? Float{} : x; }

// 2^x for x <= 0.
template <bool Short>
inline Float exp2(Float x) {
#if defined(__AVX512F__)
  return (Float)exp2_512<Short>((__m512)x);
#else
  return x < all(-126.0f) ? Float{} : exponential(x * 0.693147181f);
#endif
}

// Products of packed float32: of float32 inputs, and of bfloat16 ones that were widened.
struct FloatProducts {
  using Packed = float;
  static constexpr int64_t kDepth = 1, kGroup = 1;  // dh and keys are padded to multiples of these
  static constexpr bool kShort = false;
  static void begin() {}
  static void end() {}

  // K [keys, width], V [keys, width]
  template <class T>
  static void pack(const T* k, int64_t k_stride, const T* v, int64_t v_stride, int64_t count, int64_t, int64_t dh,
                   int64_t width, int64_t, float* packed_k, float* packed_v) {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t d = 0; d < dh; ++d) {
        packed_k[i * width + d] = widen(k[i * k_stride + d]);
        packed_v[i * width + d] = widen(v[i * v_stride + d]);
      }
  }
  // Q^T [width, kQueries]
  template <class T>
  static void pack_queries(const T* q, int64_t stride, int64_t count, int64_t dh, int64_t, bool negate, float* packed) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == sizeof(float)) {
      pack_columns(q, stride * static_cast<int64_t>(sizeof(T)), count, dh, reinterpret_cast<uint32_t*>(packed));
      if (negate)
        for (int64_t i = 0; i < dh * kQueries; ++i) packed[i] = -packed[i];
      return;
    }
#endif
    for (int64_t d = 0; d < dh; ++d) {
      for (int64_t i = 0; i < count; ++i) packed[d * kQueries + i] = negate ? -widen(q[i * stride + d]) : widen(q[i * stride + d]);
      for (int64_t i = count; i < kQueries; ++i) packed[d * kQueries + i] = 0.0f;
    }
  }
  // The first `columns` queries of the block.
  static void scores(int64_t keys, int64_t width, const float* k, const float* q, float* s, int64_t columns) {
    gemm(keys, columns, width, k, width, 1, q, kQueries, s, kQueries, false);
  }
  static void values(int64_t keys, int64_t width, int64_t, const float* v, const float* p, float* o, int64_t columns) {
    gemm(width, columns, keys, v, 1, width, p, kQueries, o, kQueries, true);
  }
  // Probabilities take the place of the scores.
  static float* probabilities(float* scores, float*) { return scores; }
  static void store_pair(float* p, int64_t row, int64_t column, Float first, Float second, bool both) {
    store(p + row * kQueries + column, first);
    if (both) store(p + (row + 1) * kQueries + column, second);
  }
  static const float* at_key(const float* v, int64_t key, int64_t width, int64_t) { return v + key * width; }
};

// What one thread works in.
template <class Products>
struct Scratch {
  using Packed = typename Products::Packed;
  Packed *k, *v, *q, *p;
  float *s, *o, *largest, *sum, *block;

  static Scratch carve(Carver& carver, int64_t keys, int64_t width) {
    Scratch x;
    x.k = carver.take<Packed>(keys * width);
    x.v = carver.take<Packed>(keys * width);
    x.q = carver.take<Packed>(kQueries * width);
    x.s = carver.take<float>(up(kKeys, 32) * kQueries);
    x.p = carver.take<Packed>(Products::kGroup > 1 ? up(kKeys, 32) * kQueries : 0);
    x.o = carver.take<float>(width * kQueries);
    x.largest = carver.take<float>(kQueries);
    x.sum = carver.take<float>(kQueries);
    x.block = carver.take<float>(kQueries);
    return x;
  }
};

// Maxima over the keys of scores [keys, kQueries], of the first `columns` queries.
template <int64_t columns>
void block_maximum(const float* s, int64_t keys, float* out) {
  constexpr int64_t vectors = columns / kLanes;
  Float m[vectors];
  for (int j = 0; j < vectors; ++j) m[j] = load(s + j * kLanes);
  for (int64_t i = 1; i < keys; ++i)
    for (int j = 0; j < vectors; ++j) m[j] = larger(m[j], load(s + i * kQueries + j * kLanes));
  for (int j = 0; j < vectors; ++j) store(out + j * kLanes, m[j]);
}

// Whether a maximum of the first `columns` is so large, or so small, that its exponents are to be taken by `subtract`.
template <int64_t columns>
bool is_far(const float* block, float c) {
  Int near = all(-1);
  for (int64_t j = 0; j < columns; j += kLanes) {
    const Float x = load(block + j) * c;
    near &= (x < all(kFar)) & (x > all(-kFar));
  }
  int32_t lanes[kLanes], every = -1;
  store(lanes, near);
  for (const int32_t lane : lanes) every &= lane;
  return every == 0;
}

// Scores [keys, columns] less the maximum that there will be.
[[gnu::noinline, gnu::cold]] void subtract(float* s, int64_t keys, int64_t columns, const float* before, const float* block) {
  for (int64_t j = 0; j < columns; j += kLanes) {
    const Float now = before ? larger(load(before + j), load(block + j)) : load(block + j);
    const Float base = finite_or_zero(now);
    for (int64_t i = 0; i < keys; ++i) store(s + i * kQueries + j, load(s + i * kQueries + j) - base);
  }
}

// Scores [keys, kQueries] of one block become probabilities; maximum, sum and output so far are brought up to date.
template <class Products, int64_t columns>
void softmax_block(const Scratch<Products>& x, int64_t keys, int64_t padded, int64_t width, float c, bool first) {
  block_maximum<columns>(x.s, keys, x.block);
  auto* p = Products::probabilities(x.s, reinterpret_cast<float*>(x.p));
  auto* packed = reinterpret_cast<typename Products::Packed*>(p);
  float rescale[kQueries];
  bool changed = false;
  const bool far = is_far<columns>(x.block, c);
  if (far) subtract(x.s, keys, columns, first ? nullptr : x.largest, x.block);
  for (int64_t j = 0; j < columns; j += kLanes) {
    const Float before = first ? all(-std::numeric_limits<float>::infinity()) : load(x.largest + j);
    const Float now = larger(before, load(x.block + j));
    store(x.largest + j, now);
    const Float base = finite_or_zero(now);
    const Float factor = first ? Float{} : exp2<false>((before - base) * c);
    store(rescale + j, factor);
    Float sum = first ? Float{} : load(x.sum + j) * factor;
    const Float offset = far ? Float{} : base * c;
    int64_t i = 0;
    for (; i + 2 <= keys; i += 2) {
      const Float a = exp2<Products::kShort>(load(x.s + i * kQueries + j) * c - offset);
      const Float b = exp2<Products::kShort>(load(x.s + (i + 1) * kQueries + j) * c - offset);
      sum += a + b;
      Products::store_pair(packed, i, j, a, b, true);
    }
    if (i < keys) {
      const Float a = exp2<Products::kShort>(load(x.s + i * kQueries + j) * c - offset);
      sum += a;
      Products::store_pair(packed, i, j, a, Float{}, Products::kGroup > 1);
      i += 2;
    }
    if (Products::kGroup > 1)
      for (; i < padded; i += 2) Products::store_pair(packed, i, j, Float{}, Float{}, true);
    store(x.sum + j, sum);
  }
  for (int64_t j = 0; j < columns; ++j) changed |= !(rescale[j] == 1.0f);
  if (first) {
    std::memset(x.o, 0, static_cast<size_t>(width * kQueries) * sizeof(float));
  } else if (changed) {
    for (int64_t d = 0; d < width; ++d)
      for (int64_t j = 0; j < columns; j += kLanes)
        store(x.o + d * kQueries + j, load(x.o + d * kQueries + j) * load(rescale + j));
  }
}

// o [dh, kQueries] over its sums -> out [rows, dh]
template <class T>
void write_output(const float* o, const float* sum, T* out, int64_t stride, int64_t rows, int64_t dh) {
#if defined(__AVX512F__)
  for (int64_t i = 0; i < rows; i += 16) {
    const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_load_ps(sum + i));
    for (int64_t d = 0; d < dh; d += 16) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int64_t n = 0; n < 16; ++n)
        r[n] = d + n < dh ? _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(o + (d + n) * kQueries + i), inverse))
                          : _mm512_setzero_si512();
      transpose16(r);
      for (int64_t n = 0; n < 16 && i + n < rows; ++n)
        store16(out + (i + n) * stride + d, _mm512_castsi512_ps(r[n]), first16(dh - d));
    }
  }
#else
  for (int64_t i = 0; i < rows; ++i) {
    const float inverse = 1.0f / sum[i];
    for (int64_t d = 0; d < dh; ++d) put(out + i * stride + d, o[d * kQueries + i] * inverse);
  }
#endif
}

template <class Products, class T>
void run_typed(const Problem& f, int64_t begin, int64_t end) {
  using Packed = typename Products::Packed;
  const int64_t blocks = (f.q.count + kQueries - 1) / kQueries;
  const int64_t width = up(f.dh, Products::kDepth);
  const int64_t counts[2] = {up(f.k[0].count, Products::kGroup), up(f.k[1].count, Products::kGroup)};
  const int64_t keys = counts[0] + counts[1];
  Carver measure(nullptr);
  Scratch<Products>::carve(measure, keys, width);
  const Workspace room(measure.used());
  Carver carver(room.bytes());
  const auto x = Scratch<Products>::carve(carver, keys, width);
  const float c = std::fabs(f.scale) * kLog2e;

  Products::begin();
  int64_t packed_head = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task / blocks, b = head / f.heads, h = head % f.heads, start = task % blocks * kQueries;
    const auto at = [&](const Tokens& t) { return static_cast<T*>(t.data) + b * t.batch + h * t.head; };
    if (head != packed_head) {
      int64_t offset = 0;
      for (int run = 0; run < 2; offset += counts[run++])
        Products::template pack<T>(at(f.k[run]), f.k[run].token, at(f.v[run]), f.v[run].token, f.k[run].count,
                                   counts[run], f.dh, width, keys, x.k + offset * width,
                                   const_cast<Packed*>(Products::at_key(x.v, offset, width, keys)));
      packed_head = head;
    }
    const int64_t rows = std::min(kQueries, f.q.count - start);
    Products::template pack_queries<T>(at(f.q) + start * f.q.token, f.q.token, rows, f.dh, width, f.scale < 0, x.q);
    const auto attend = [&]<int64_t columns>() {
      bool first = true;
      int64_t offset = 0;
      for (int run = 0; run < 2; offset += counts[run++])
        for (int64_t key = 0; key < f.k[run].count; key += kKeys) {
          const int64_t here = std::min(kKeys, f.k[run].count - key), padded = std::min(kKeys, counts[run] - key);
          const int64_t scored = Products::kGroup > 1 ? padded : here;
          Products::scores(scored, width, x.k + (offset + key) * width, x.q, x.s, columns);
          softmax_block<Products, columns>(x, here, padded, width, c, first);
          auto* p = reinterpret_cast<Packed*>(Products::probabilities(x.s, reinterpret_cast<float*>(x.p)));
          Products::values(padded, width, keys, Products::at_key(x.v, offset + key, width, keys), p, x.o, columns);
          first = false;
        }
    };
    if (rows <= 16)  // of 1025 tokens the last block holds one
      attend.template operator()<16>();
    else if (rows <= 32)
      attend.template operator()<32>();
    else
      attend.template operator()<kQueries>();
    T* out = static_cast<T*>(f.output.data) + b * f.output.batch + h * f.output.head + start * f.output.token;
    write_output(x.o, x.sum, out, f.output.token, rows, f.dh);
    for (int64_t i = 0; f.lse && i < rows; ++i)
      f.lse[head * f.lse_stride + start + i] = x.largest[i] * std::fabs(f.scale) + std::log(x.sum[i]);
  }
  Products::end();
}

inline int64_t tasks_of(const Problem& f) { return f.batches * f.heads * ((f.q.count + kQueries - 1) / kQueries); }

template <class Products>
void run_tasks(const Problem& f, int64_t begin, int64_t end) {
  if constexpr (Products::kGroup == 1) {
    if (f.element == Element::float32) return run_typed<Products, float>(f, begin, end);
  }
  run_typed<Products, uint16_t>(f, begin, end);
}

}  // namespace
}  // namespace zs3fast::encoder_attention
