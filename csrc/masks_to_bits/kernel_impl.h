// The kernel of kernel.h, compiled once an instruction set: the including file names it in ZS3FAST_ISA.
#include <cstdint>
#include <cstring>

#include "masks_to_bits/kernel.h"

namespace zs3fast::masks_to_bits {
namespace {

// 1 / (1 + e^-x), 3 ulp; NaN stays NaN. Plain arithmetic, so that loops over it vectorise.
inline float sigmoid(float x) {
  x = x < -87.0f ? -87.0f : x > 87.0f ? 87.0f : x;
  const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer and leaves that in the low bits
  const float shifted = x * -1.44269504f + shifter, n = shifted - shifter;
  float r = -x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = static_cast<int32_t>(static_cast<uint32_t>(bits - 0x4B400000 + 127) << 23);
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return 1.0f / (1.0f + p * power);
}

// The 2 w pixels of one row of the padded size that the patches read.
void read_taps(const Request& r, const float* mask, int64_t row, float* column, float* taps) {
  const int64_t count = 2 * r.grid_w;
  if (!r.logits) {
    mask += row * r.stride_y;
    for (int64_t i = 0; i < count; ++i) taps[i] = mask[r.tap[i] * r.stride_x];
    return;
  }
  const float *above = mask + r.padded_y.low[row] * r.stride_y, *below = mask + r.padded_y.high[row] * r.stride_y;
  const float down = r.padded_y.weight[row], up = 1.0f - down;
  if (r.stride_x == 1) {
#pragma omp simd
    for (int64_t x = 0; x < r.width; ++x) column[x] = above[x] * up + below[x] * down;
  } else {
    for (int64_t x = 0; x < r.width; ++x) column[x] = above[x * r.stride_x] * up + below[x * r.stride_x] * down;
  }
  const Axis& at = r.padded_x;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    taps[i] = sigmoid(column[at.low[i]] * (1.0f - at.weight[i]) + column[at.high[i]] * at.weight[i]);
}

void run(const Request& r, int64_t index, float* scratch) {
  const float* mask = r.masks + index / r.proposals * r.stride_b + index % r.proposals * r.stride_q;
  const int64_t w = r.grid_w;
  float *column = scratch, *top = column + r.width, *bottom = top + 2 * w;
  uint32_t* bits = r.bits + index * r.words;
  uint32_t word = 0;
  int64_t n = 0;
  for (int64_t y = 0; y < r.grid_h; ++y) {
    read_taps(r, mask, r.grid_y.low[y], column, top);
    read_taps(r, mask, r.grid_y.high[y], column, bottom);
    const float down = r.grid_y.weight[y], up = 1.0f - down;
#pragma omp simd
    for (int64_t x = 0; x < w; ++x) {
      const float right = r.grid_x.weight[x], left = 1.0f - right;
      top[x] = up * (left * top[x] + right * top[w + x]) + down * (left * bottom[x] + right * bottom[w + x]);
    }
    for (int64_t x = 0; x < w; ++x, ++n) {
      word |= static_cast<uint32_t>(top[x] >= 0.5f) << (n % 32);
      if (n % 32 == 31) {
        *bits++ = word;
        word = 0;
      }
    }
  }
  if (n % 32 != 0) *bits = word;
}

}  // namespace

const Kernels ZS3FAST_ISA = {run};

}  // namespace zs3fast::masks_to_bits
