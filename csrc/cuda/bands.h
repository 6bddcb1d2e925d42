// One axis of a bilinear upsampling, align_corners = False, in integers: pixel x lies at (2x + 1) points / (2 pixels) -
// 1/2 grid points. Band k, 0 <= k <= points, holds the pixels between grid points k - 1 and k.
#pragma once

#include "cuda/host_device.h"

namespace zs3fast::cuda {

struct Axis {
  int32_t points, pixels;
};

// Whether every product of this file fits an int32, for pixels somewhat behind the last too.
inline bool fits(int64_t points, int64_t pixels) {
  return points < (1 << 30) && pixels < (1 << 30) && 2 * (points + 2) * (pixels + 64) <= INT32_MAX;
}

// First pixel of band k, 0 <= k <= points + 1: the band behind the last begins behind the last pixel.
ZS3FAST_HD int32_t first_pixel(const Axis& axis, int32_t k) {
  const int32_t numerator = at_least((2 * k - 1) * axis.pixels - axis.points, 0);
  return at_most((numerator + 2 * axis.points - 1) / (2 * axis.points), axis.pixels);
}

// How far pixel x of band k is from grid point k - 1, in 0..1.
ZS3FAST_HD float distance(const Axis& axis, int32_t k, int32_t x) {
  return static_cast<float>((2 * x + 1) * axis.points + axis.pixels - k * 2 * axis.pixels) /
         static_cast<float>(2 * axis.pixels);
}

// Pixels of the longest band.
inline int32_t longest_band(const Axis& axis) { return ceil_div(axis.pixels, axis.points); }

}  // namespace zs3fast::cuda
