// mask_loss on the CPU: what one (image, class) plane costs, on raw pointers. No torch header here.
//
// Bilinear upsampling is separable: two grid rows are widened to W pixels once, and every pixel row between them is one
// lerp of the two. A column of pixels, one vector wide, is kept in registers while the rows between two grid rows go
// by: per pixel the only load is its label, and only where the class occurs in those rows at all. Backward sums
// dz * weight over the same columns and contracts them with the widening's transpose once a grid row. A plane belongs
// to one thread, so results do not depend on the number of threads.
#pragma once

#include <cstdint>

namespace zs3fast::mask_loss {

constexpr int64_t kPad = 16;  // lanes of the widest vector: pixel rows are padded to a multiple of it

// `out` pixels over `in` grid points, align_corners = False. Band k, 0 <= k <= in, holds the pixels begin[k] to
// begin[k + 1] that lie between grid points k - 1 and k, both clamped to the grid.
struct Axis {
  int64_t in, out, padded;
  const int64_t* begin;               // [in + 2]
  const float *lower, *upper;         // [padded + kPad] weights of the two grid points, 0 behind
  const int64_t* support;             // [in + 1] grid point j owns gather[support[j]] to gather[support[j + 1]] ...
  const float* gather;                // ... its weights over the pixels from begin[j] on, 0 behind
};

struct Problem {
  Axis rows, columns;
  int64_t classes;
  float alpha, gamma;
  const float* logits;    // [B, C, h, w]
  const int32_t* labels;  // [B, H, columns.padded] channel index, or -1 for none
  const int32_t* counts;  // [B, h + 1, C] pixels of each class in each band of rows
};

struct Sums {
  double focal, intersection, prob;
};

// One build an instruction set, each in its own translation unit. `plane` is b * C + c.
struct Kernels {
  Sums (*forward)(const Problem&, int64_t plane, float* scratch);
  // grad [h, w] of the plane, from the gradients of its three sums
  void (*backward)(const Problem&, int64_t plane, float grad_focal, float grad_intersection, float grad_prob,
                   float* grad, float* scratch);
};

inline int64_t scratch_floats(const Problem& problem) { return 4 * (problem.columns.padded + kPad); }

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

}  // namespace zs3fast::mask_loss
