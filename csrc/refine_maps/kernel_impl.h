// The kernels of kernel.h, compiled once an instruction set: the including file names it in ZS3FAST_ISA.
#include <cmath>
#include <cstdint>

#include "refine_maps/kernel.h"
#include "simd.h"

namespace zs3fast::refine_maps {
namespace {

#if defined(__AVX512F__)
constexpr int kWide = 2;  // vectors of pixels at once: 16 sums, 2 weights
#else
constexpr int kWide = 1;  // 8 sums, 1 weight: 9 of 16 registers
#endif
static_assert(kColumns % (kWide * kLanes) == 0);

inline Float root(Float x) {
  for (int i = 0; i < kLanes; ++i) x[i] = std::sqrt(x[i]);
  return x;
}
inline Float magnitude(Float x) { return (Float)((Int)x & 0x7fffffff); }

// Where the neighbours of row y start: floats from a plane's pixel (0, 0).
inline int64_t offset(const Tile& t, const Neighbours& near, int64_t k, int64_t y) {
  int64_t at = y + near.dy[k];
  at = at < 0 ? 0 : at >= t.rows ? t.rows - 1 : at;
  return at * t.stride + near.dx[k];
}

inline void fill_ends(const Tile& t, float* row) {
  for (int64_t x = 1; x <= t.pad; ++x) row[-x] = row[0];
  const float last = row[t.cols - 1];
  const int64_t end = t.weight_cols + t.pad;
  for (int64_t x = t.cols; x < end; ++x) row[x] = last;
}

void resize(const Tile& t, const float* low, const float* high, float part, const Taps& columns, float* row) {
  // a + part * (b - a) of equal a and b is a: what is flat stays flat to the last bit, and its neighbours equal
  if (columns.low == nullptr) {
    for (int64_t x = 0; x < t.cols; ++x) row[x] = low[x] + part * (high[x] - low[x]);
  } else {
    for (int64_t x = 0; x < t.cols; ++x) {
      const int32_t l = columns.low[x], h = columns.high[x];
      const float left = low[l] + part * (high[l] - low[l]), right = low[h] + part * (high[h] - low[h]);
      row[x] = left + columns.part[x] * (right - left);
    }
  }
  fill_ends(t, row);
}

void weigh(const Tile& t, const Neighbours& near, const float* image, int64_t channels, int64_t y, float* weights,
           float* scratch) {
  const int64_t K = near.count, D = K / 8;
  const float centres = static_cast<float>(D), samples = static_cast<float>(9 * D);
  for (int64_t x = 0; x < t.weight_cols; x += kLanes) {
    for (int64_t k = 0; k < K; ++k) store(scratch + k * kLanes, Float{});
    for (int64_t r = 0; r < channels; ++r) {
      const float* plane = image + r * t.plane;
      const Float centre = load(plane + y * t.stride + x);
      Float sum{};
      for (int64_t k = 0; k < K; ++k) sum += load(plane + offset(t, near, k, y) + x) - centre;
      const Float mean = sum / samples;  // from the centre: what is flat has a deviation of exactly 0
      Float square = mean * mean * centres;
      for (int64_t k = 0; k < K; ++k) {
        const Float d = load(plane + offset(t, near, k, y) + x) - centre - mean;
        square += d * d;
      }
      const Float factor = 1.0f / (root(square / (samples - 1.0f)) * 0.1f + 1e-8f);
      for (int64_t k = 0; k < K; ++k) {
        const Float d = magnitude(load(plane + offset(t, near, k, y) + x) - centre);
        store(scratch + k * kLanes, load(scratch + k * kLanes) - d * factor);
      }
    }
    const float one = 1.0f / static_cast<float>(channels);
    Float largest = load(scratch);
    for (int64_t k = 1; k < K; ++k) {
      const Float e = load(scratch + k * kLanes);
      largest = e > largest ? e : largest;
    }
    Float total{};
    for (int64_t k = 0; k < K; ++k) {
      const Float e = exponential((load(scratch + k * kLanes) - largest) * one);
      store(scratch + k * kLanes, e);
      total += e;
    }
    const Float share = 1.0f / total;
    for (int64_t k = 0; k < K; ++k) store(weights + k * t.weight_cols + x, load(scratch + k * kLanes) * share);
  }
}

template <int kNames>
void step_names(const Tile& t, const Neighbours& near, const float* weights, const float* from, float* to, int64_t y,
                int64_t x0, int64_t x1) {
  constexpr int64_t kBlock = 64;  // neighbours whose offsets are kept at once
  for (int64_t k0 = 0; k0 < near.count; k0 += kBlock) {
    const int64_t K = near.count - k0 < kBlock ? near.count - k0 : kBlock;
    int64_t offsets[kBlock];
    for (int64_t k = 0; k < K; ++k) offsets[k] = offset(t, near, k0 + k, y);
    for (int64_t x = x0; x < x1; x += kWide * kLanes) {
      float* out = to + y * t.stride + x;
      Float sum[kNames][kWide];
#pragma GCC unroll 16
      for (int n = 0; n < kNames; ++n)
#pragma GCC unroll 2
        for (int i = 0; i < kWide; ++i) sum[n][i] = k0 == 0 ? Float{} : load(out + n * t.plane + i * kLanes);
      for (int64_t k = 0; k < K; ++k) {
        const float* w = weights + (k0 + k) * t.weight_cols + x;
        const float* p = from + offsets[k] + x;
        Float weight[kWide];
#pragma GCC unroll 2
        for (int i = 0; i < kWide; ++i) weight[i] = load(w + i * kLanes);
#pragma GCC unroll 16
        for (int n = 0; n < kNames; ++n)
#pragma GCC unroll 2
          for (int i = 0; i < kWide; ++i) sum[n][i] += weight[i] * load(p + n * t.plane + i * kLanes);
      }
#pragma GCC unroll 16
      for (int n = 0; n < kNames; ++n)
#pragma GCC unroll 2
        for (int i = 0; i < kWide; ++i) store(out + n * t.plane + i * kLanes, sum[n][i]);
    }
  }
  for (int n = 0; n < kNames; ++n) fill_ends(t, to + n * t.plane + y * t.stride);
}

void step(const Tile& t, const Neighbours& near, const float* weights, const float* from, float* to, int64_t names,
          int64_t y, int64_t x0, int64_t x1) {
  x0 = x0 / kColumns * kColumns;
  const auto run = [&](auto kernel, int64_t count) {
    for (; names >= count; names -= count, from += count * t.plane, to += count * t.plane)
      kernel(t, near, weights, from, to, y, x0, x1);
  };
  run(step_names<8>, 8);
  run(step_names<4>, 4);
  run(step_names<2>, 2);
  run(step_names<1>, 1);
}

void fold(const float* from, int64_t plane, int64_t names, int64_t first, const bool* excluded, float scale, int64_t n,
          const Best& best) {
  // whole vectors: rows of the state and of the planes have room behind them
  for (int64_t x = 0; x < n; x += kLanes) {
    Float value = load(best.value + x), largest{};
    Int label = load(best.label + x);
    if (best.sum != nullptr) largest = load(best.largest + x);
    const Float before = largest;
    for (int64_t i = 0; i < names; ++i) {
      const Float z = load(from + i * plane + x);
      largest = z > largest ? z : largest;
      if (excluded[first + i]) continue;
      const Int better = (z > value) | ((z != z) & (value == value));  // NaN is the largest, the first one stays
      value = better ? z : value;
      label = better ? all(static_cast<int32_t>(first + i)) : label;
    }
    store(best.value + x, value);
    store(best.label + x, label);
    if (best.sum == nullptr) continue;
    Float sum = load(best.sum + x) * exponential((before - largest) * scale);
    for (int64_t i = 0; i < names; ++i) sum += exponential((load(from + i * plane + x) - largest) * scale);
    store(best.largest + x, largest);
    store(best.sum + x, sum);
  }
}

}  // namespace

const Kernels ZS3FAST_ISA = {resize, weigh, step, fold};

}  // namespace zs3fast::refine_maps
