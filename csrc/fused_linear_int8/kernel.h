// fused_linear_int8 on the CPU, on raw pointers and strides. No torch header here.
//
//   q = round(x / s) + z in 0..255,  s and z one a row of x
//   out = residual + activation(s t (q - z) W^T + bias),  t one a row of W,  computed as  out^T = W q^T
//
// As in fused_linear a row of W lies in memory as a product reads it from its left side: W is neither copied nor packed.
// x is quantised while it is packed, 64 rows at a time, turned over in fours. One task is a panel of rows of W times one
// such block; sums are whole numbers, and z comes off them by the sums of W's rows, taken when a task comes to a panel.
#pragma once

#include <cstdint>

#include "activation.h"

namespace zs3fast::fused_linear_int8 {

struct Problem {
  int64_t rows, outputs, depth;  // x [rows, depth], W [outputs, depth]: multiples of 64 and 32
  const void* x;
  const int8_t* weight;
  const float* scale;  // of W's rows
  const void *bias, *residual;
  void* out;
  int64_t x_stride, weight_stride, residual_stride, out_stride;  // elements between rows
  Activation activation;
  uint8_t* packed;  // room for blocks(rows) * block_bytes(depth), aligned to cache lines
};

constexpr int64_t kRows = 64;         // of x, of a block
constexpr int64_t kOutputs = 96;      // of a panel
constexpr int64_t kMaxDepth = 65536;  // 255 * 127 * this is under 2^31

inline int64_t blocks(int64_t rows) { return (rows + kRows - 1) / kRows; }
inline int64_t panels(int64_t outputs) { return (outputs + kOutputs - 1) / kOutputs; }
// q, then s and z of the rows.
inline int64_t block_bytes(int64_t depth) { return kRows * (depth + static_cast<int64_t>(sizeof(float) + sizeof(int32_t))); }

// One build an instruction set, each in its own translation unit; index 0: x, bias, residual and out are float32, 1: bfloat16.
struct Kernel {
  const char* name;
  void (*pack[2])(const Problem&, int64_t, int64_t);  // blocks [begin, end)
  void (*run[2])(const Problem&, int64_t, int64_t);   // tasks [begin, end) of panels * blocks
};

extern const Kernel kernel_avx512_vnni, kernel_amx;

}  // namespace zs3fast::fused_linear_int8
