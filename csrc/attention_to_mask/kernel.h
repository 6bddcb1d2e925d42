// attention_to_mask on the CPU: what one task computes, on raw pointers and strides. No torch header here.
//
// Everything is kept transposed, scores as [n, c] with classes along the vector: the small matrix Q^T is packed once a
// task, K is used as it lies, the softmax over n is vertical (no horizontal reduction), and a Philox counter, which
// serves four neighbouring n, fills four rows. Scores live in one L2-sized tile; nothing of size C x N is stored.
#pragma once

#include <cstdint>

namespace zs3fast::attention_to_mask {

// [B, heads, rows, dh] in any layout; strides in elements.
template <class T>
struct Heads {
  T* data;
  int64_t batch, head, row, column;
  T* at(int64_t b, int64_t h) const { return data + b * batch + h * head; }
};

// Keep element (b, h, c, n) iff word n % 4 of Philox4x32-10(counter = (n / 4, c, b * heads + h, 0), key = seed) >= threshold.
struct Dropout {
  bool active;
  uint32_t threshold, key0, key1;
  float keep_scale;  // 1 / (1 - p)
};

struct Sizes {
  int64_t batch, heads, classes, patches, width;
};

struct Forward {
  Sizes size;
  float scale;
  Dropout dropout;
  Heads<const float> q, k, v;
  Heads<float> output;
  float* masks;  // [B, C, N] contiguous, or null
  float* lse;    // [B, heads, C] contiguous
};

struct Backward {
  Sizes size;
  float scale;
  Dropout dropout;
  Heads<const float> q, k, v, output, grad_output;
  const float* lse;         // [B, heads, C] contiguous
  const float* grad_masks;  // [B, N, C rounded up to lanes], zeros behind, divided by heads; or null
  Heads<float> dq, dk, dv;
};

// One build a instruction set, each in its own translation unit.
struct Kernels {
  int64_t lanes;  // classes a vector holds: cut C in multiples of it
  int64_t (*forward_scratch)(const Sizes&, int64_t heads, int64_t classes);  // floats a task needs
  // Classes [c0, c1) of image b, heads [h0, h1); with masks a task must cover all heads.
  void (*forward)(const Forward&, int64_t b, int64_t h0, int64_t h1, int64_t c0, int64_t c1, float* scratch);
  int64_t (*backward_scratch)(const Sizes&);
  void (*backward)(const Backward&, int64_t b, int64_t h, float* scratch);  // all of one head of one image
};

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

constexpr int64_t kPatchBlock = 128;  // n of a score tile, a multiple of 4
constexpr int64_t kClassBlock = 128;  // most c of a score tile, a multiple of every vector's lanes

}  // namespace zs3fast::attention_to_mask
