// Which classes can win on a part of a tile, and which does at each pixel.
#pragma once

#include <type_traits>

#include "proposals_to_labels/request.h"
#include "proposals_to_labels/arithmetic.h"

namespace zs3fast::proposals_to_labels {
namespace {

// Weights of some classes: rows[q * stride + k] is what proposal q adds to class `classes[k]`; ascending.
struct Candidates {
  const float* rows;
  int64_t stride, count;
  const int32_t* classes;
};

// Writes the indices k of the classes that can win where every proposal lies within middle +- half, and returns how many.
// Class c loses to the best at the middle, w, for all such masks if
//     sum_q (A[q, w] - A[q, c]) middle[q] - |A[q, w] - A[q, c]| half[q] > 2 slack,
// one slack for rounding and one for the proposals too small to be looked at. spread: [proposals], no |A[q, w] - A[q, c]| is
// greater.
// sums, losses: [round_up(count)].
inline int64_t find_winners(
    const Candidates& candidates, int64_t proposals, const float* middle, const float* half, const float* spread, float slack,
    float* __restrict sums, float* __restrict losses, int32_t* winners) {
  const int64_t count = candidates.count;
  for (int64_t k = 0; k < count; ++k) sums[k] = losses[k] = 0.0f;
  for (int64_t q = 0; q < proposals; ++q) {
    const float* __restrict row = candidates.rows + q * candidates.stride;
    const float m = middle[q];
    for (int64_t k = 0; k < count; ++k) sums[k] += row[k] * m;
  }
  int64_t best = 0;
  for (int64_t k = 1; k < count; ++k) best = sums[k] > sums[best] ? k : best;
  for (int64_t q = 0; q < proposals; ++q) {
    const float* __restrict row = candidates.rows + q * candidates.stride;
    const float h = half[q], w = row[best];
    if (h * spread[q] * static_cast<float>(proposals) < slack) continue;
    for (int64_t k = 0; k < count; ++k) losses[k] += __builtin_fabsf(w - row[k]) * h;
  }
  const float top = sums[best] - 2.0f * slack;
  int64_t found = 0;
  for (int64_t k = 0; k < count; ++k) {
    winners[found] = static_cast<int32_t>(k);
    found += !(sums[k] + losses[k] < top);
  }
  return found;
}

// Larger, NaN being the largest: on equality the class that came first stays.
inline Int beats(Float a, Float b) { return (a > b) | ((a != a) & (b == b)); }

// The best of R classes and what was best before, on kVectors vectors of pixels.
// weights: [proposals, R] of these classes.  masks: rows of `stride` pixels.  start: the sums before the first proposal.
template <int R>
inline void multiply_and_compare(
    int64_t proposals, const float* weights, const float* start, const int32_t* classes, const float* masks, int64_t stride,
    float* best, int32_t* label) {
  Float sum[R][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = all(start[r]);
  for (int64_t q = 0; q < proposals; ++q) {
    Float mask[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) mask[v] = load(masks + q * stride + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Float weight = all(weights[q * R + r]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] += weight * mask[v];
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    Float top = load(best + v * kLanes);
    Int who = load(label + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Int better = beats(sum[r][v], top);
      top = better ? sum[r][v] : top;
      who = better ? all(classes[r]) : who;
    }
    store(best + v * kLanes, top);
    store(label + v * kLanes, who);
  }
}

// weights: groups of kGroup classes (the last may have fewer), each [proposals, classes of the group].
inline void find_best(
    int64_t count, int64_t proposals, const float* weights, const float* start, const int32_t* classes, const float* masks,
    int64_t pixels, float* best, int32_t* label) {
  for (int64_t p = 0; p < pixels; p += kVectors * kLanes) {
    for (int64_t k = 0; k < count; k += kGroup) {
      const auto run = [&](auto rows) {
        multiply_and_compare<rows>(
            proposals, weights + k * proposals, start + k, classes + k, masks + p, pixels, best + p, label + p);
      };
      switch (smaller(count - k, kGroup)) {
        case 6: run(std::integral_constant<int, 6>{}); break;
        case 5: run(std::integral_constant<int, 5>{}); break;
        case 4: run(std::integral_constant<int, 4>{}); break;
        case 3: run(std::integral_constant<int, 3>{}); break;
        case 2: run(std::integral_constant<int, 2>{}); break;
        default: run(std::integral_constant<int, 1>{});
      }
    }
  }
}

}  // namespace
}  // namespace zs3fast::proposals_to_labels
