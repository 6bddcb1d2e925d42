// masks_to_bits on the CPU: one task is one mask, on raw pointers and strides. No torch header here.
//
// A row of patches reads two rows of the padded size, 2 w pixels of each (taps): straight from a soft mask, or as
// sigmoids of logits that are interpolated down a whole row first and across at the taps alone.
#pragma once

#include <cstdint>

namespace zs3fast::masks_to_bits {

// A bilinear resize along one axis: value = (1 - weight) in[low] + weight in[high], one entry an output place.
struct Axis {
  const int32_t *low, *high;
  const float* weight;
};

struct Request {
  const float* masks;
  int64_t proposals, stride_b, stride_q, stride_y, stride_x;
  int64_t width;            // of the maps that are read
  int64_t grid_h, grid_w, words;
  bool logits;
  Axis grid_y, grid_x;      // padded size -> grid
  const int32_t* tap;       // [2 grid_w] columns of the padded size: low ones, then high ones
  Axis padded_y, padded_x;  // logits -> padded size; padded_x is given at the taps
  uint32_t* bits;           // [B, Nq, words]
};

// One build an instruction set, each in its own translation unit.
struct Kernels {
  void (*run)(const Request&, int64_t mask, float* scratch);  // scratch: width + 4 grid_w floats
};

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

}  // namespace zs3fast::masks_to_bits
