// What the emulated kernels share: tensors as they come from Python, and the choice of type and head width.
#pragma once

#include <cstdio>
#include <exception>

#include "cuda/mma_attention.h"
#include "cuda/wgmma.h"

namespace zs3fast {

// A tensor: where it lies, its strides in elements, and the storage it may be read from or written to.
struct Tensor {
  void* data;
  int64_t stride[4];
  uintptr_t begin, end;
};

struct Entry {
  const Tensor* tensors;

  template <class T>
  T* data(int i) const { return static_cast<T*>(tensors[i].data); }
  int64_t stride(int i, int axis) const { return tensors[i].stride[axis]; }
  template <class T>
  mma::Heads<T> heads(int i) const { return {data<T>(i), stride(i, 0), stride(i, 1), stride(i, 2)}; }
};

// Runs `body`; what went wrong goes to `error`.
template <class Body>
bool guarded(const Tensor* tensors, int count, char* error, int64_t length, Body body) {
  mma::Memory::buffers.clear();
  for (int i = 0; i < count; ++i) mma::Memory::buffers.push_back({tensors[i].begin, tensors[i].end});
  mma::Block::matrix_loads = mma::Block::bank_conflicts = 0;
  try {
    body();
    return true;
  } catch (const std::exception& problem) {
    std::snprintf(error, length, "%s", problem.what());
    return false;
  }
}

// As csrc/cuda/wgmma_start.h makes them.
template <class T>
wgmma::Map map_of(const mma::Heads<const T>& x, int images, int heads, int tokens, int dh, int rows) {
  constexpr int64_t kSize = sizeof(T);
  return {reinterpret_cast<const unsigned char*>(x.data),
          {dh, tokens, heads, images},
          {kSize, x.token * kSize, x.head * kSize, x.image * kSize},
          rows};
}

}  // namespace zs3fast

// run<T, kDh>(entry, sizes, scale) of the type and head width asked for, as a function for ctypes; WIDE: at least 64.
#define ZS3FAST_ENTRY_OF(NAME, RUN)                                                                          \
  extern "C" bool NAME(const zs3fast::Tensor* tensors, int count, const int64_t* sizes, int dh, bool bf16,   \
                       float scale, int64_t* conflicts, char* error, int64_t length) {                       \
    const Entry entry{tensors};                                                                              \
    return guarded(tensors, count, error, length, [&] {                                                      \
      bf16 ? RUN(mma::BFloat16) : RUN(mma::Half);                                                            \
      *conflicts = mma::Block::bank_conflicts;                                                               \
    });                                                                                                      \
  }
#define ZS3FAST_RUN_WIDE(T) (dh == 64 ? run<T, 64>(entry, sizes, scale) : run<T, 128>(entry, sizes, scale))
#define ZS3FAST_RUN(T) (dh == 32 ? run<T, 32>(entry, sizes, scale) : ZS3FAST_RUN_WIDE(T))
#define ZS3FAST_ENTRY(NAME) ZS3FAST_ENTRY_OF(NAME, ZS3FAST_RUN)
#define ZS3FAST_WIDE_ENTRY(NAME) ZS3FAST_ENTRY_OF(NAME, ZS3FAST_RUN_WIDE)
