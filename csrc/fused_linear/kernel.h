// fused_linear on the CPU, on raw pointers and strides. No torch header here.
//
//   out = residual + activation(x W^T + bias),  computed as  out^T = W x^T
//
// A row of W lies in memory as a product reads it from its left side, by broadcasts or as a row of a tile, so weights are
// neither copied nor kept twice. What is packed is x: 64 rows at a time, turned over, once a call. One task is a panel of
// rows of W times one such block; sums stay in float32 until bias, activation and residual are added.
#pragma once

#include <cstdint>

#include "activation.h"

namespace zs3fast::fused_linear {

struct Problem {
  int64_t rows, outputs, depth;  // x [rows, depth], W [outputs, depth]: depth and outputs are multiples of 32
  const void *x, *weight, *bias, *residual;
  void* out;
  int64_t x_stride, weight_stride, residual_stride, out_stride;  // elements between rows
  Activation activation;
  void* packed;  // room for blocks(rows) * 64 * depth elements
};

constexpr int64_t kRows = 64;     // of x, of a block
constexpr int64_t kOutputs = 96;  // of a panel

inline int64_t blocks(int64_t rows) { return (rows + kRows - 1) / kRows; }
inline int64_t panels(int64_t outputs) { return (outputs + kOutputs - 1) / kOutputs; }

// One build an instruction set, each in its own translation unit.
struct Kernel {
  const char* name;
  bool bf16;                                      // of bfloat16, else of float32
  void (*pack)(const Problem&, int64_t, int64_t); // blocks [begin, end)
  void (*run)(const Problem&, int64_t, int64_t);  // tasks [begin, end) of panels * blocks
};

extern const Kernel kernel_avx512, kernel_avx512_bf16, kernel_amx;

}  // namespace zs3fast::fused_linear
