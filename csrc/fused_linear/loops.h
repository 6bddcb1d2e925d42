// The loops of fused_linear, for AVX-512; what multiplies is `Products`, which see.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "avx512.h"
#include "epilogue.h"
#include "fused_linear/kernel.h"

namespace zs3fast::fused_linear {
namespace {

static_assert(kRows == kBlock);
constexpr int64_t kDepth = 256;  // of a step: a block of x of this depth stays in the first cache

template <class T>
void pack_blocks(const Problem& f, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const T* x = static_cast<const T*>(f.x) + block * kRows * f.x_stride;
    pack_columns(x, f.x_stride * static_cast<int64_t>(sizeof(T)), std::min(kRows, f.rows - block * kRows),
                 f.depth * static_cast<int64_t>(sizeof(T)) / 4,
                 reinterpret_cast<uint32_t*>(static_cast<T*>(f.packed) + block * kRows * f.depth));
  }
}

template <class Products, class T>
void run_tasks(const Problem& f, int64_t begin, int64_t end) {
  const int64_t count = blocks(f.rows);
  const std::unique_ptr<float, void (*)(void*)> sums(
      static_cast<float*>(std::aligned_alloc(64, kOutputs * kBlock * sizeof(float))), std::free);
  if (!sums) throw std::bad_alloc();
  Products::begin();
  for (int64_t task = begin; task < end; ++task) {  // neighbours share their panel, which stays in the second cache
    const int64_t first = task / count * kOutputs, block = task % count;
    const int64_t outputs = std::min(kOutputs, f.outputs - first), rows = std::min(kRows, f.rows - block * kRows);
    const T* w = static_cast<const T*>(f.weight) + first * f.weight_stride;
    const T* x = static_cast<const T*>(f.packed) + block * kRows * f.depth;
    for (int64_t k = 0; k < f.depth; k += kDepth)
      Products::multiply(outputs, std::min(kDepth, f.depth - k), w + k, f.weight_stride, x + k * kBlock, sums.get(),
                         k > 0, rows);
    finish<T>(f, [&](int64_t j, int64_t i) { return _mm512_load_ps(sums.get() + j * kBlock + i); }, first, outputs,
              block * kRows, rows);
  }
  Products::end();
}

}  // namespace
}  // namespace zs3fast::fused_linear
