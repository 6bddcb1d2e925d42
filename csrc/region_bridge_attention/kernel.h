// region_bridge_attention on the CPU: what regions add to plain attention over prefix and patches, on raw pointers and
// strides. No torch header here.
//
// One task is one region of one head: its own row, and the rows of the patches of its window, which belong to no other
// region. Tasks share nothing they write. Together they are 2 N + M of (P + N)^2 pairs, so they are bound by reading
// their rows once; plain loops that the compiler vectorises are enough.
#pragma once

#include <cstdint>

namespace zs3fast::region_bridge_attention {

// One head of one image: rows of dh neighbouring elements, `stride` apart.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  T* operator[](int64_t row) const { return data + row * stride; }
};

// Where tokens stand: queries have `prefix_q` prefix rows, keys `prefix_k`; windows are wh x ww patches.
struct Layout {
  int64_t prefix_q, prefix_k, patches, grid_w, regions_w, wh, ww, dh;
  float scale;
};

template <class T>  // float, or bfloat16 as uint16_t
struct Forward {
  Layout layout;
  Rows<const T> q, k, v;
  Rows<T> output;  // prefix and patches: attention over prefix and patches, later the whole
  float* lse;      // the same
};

struct Backward {
  Layout layout;
  Rows<const float> grad_output, q, k, v, output;
  const float* lse;
  Rows<const float> block_dq, block_dk, block_dv;  // what the attention over prefix and patches gives
  Rows<float> dq, dk, dv;
};

// One build an instruction set, each in its own translation unit.
struct Kernels {
  // `scratch` has room for a window, one more and dh
  void (*forward)(const Forward<float>&, int64_t region, float* scratch);
  void (*forward_bf16)(const Forward<uint16_t>&, int64_t region, float* scratch);
  void (*backward)(const Backward&, int64_t region);
};

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

}  // namespace zs3fast::region_bridge_attention
