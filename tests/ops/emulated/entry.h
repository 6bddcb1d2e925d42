// What the emulated kernels share: tensors as they come from Python, and the choice of type and head width.
#pragma once

#include <cstdio>
#include <exception>

#include "cuda/mma_attention.h"

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

}  // namespace zs3fast

// run<T, kDh>(entry, sizes, scale) of the type and head width asked for, as a function for ctypes.
#define ZS3FAST_ENTRY(NAME)                                                                                  \
  extern "C" bool NAME(const zs3fast::Tensor* tensors, int count, const int64_t* sizes, int dh, bool bf16,   \
                       float scale, int64_t* conflicts, char* error, int64_t length) {                       \
    const Entry entry{tensors};                                                                              \
    return guarded(tensors, count, error, length, [&] {                                                      \
      bf16 ? dh == 32   ? run<mma::BFloat16, 32>(entry, sizes, scale)                                        \
             : dh == 64 ? run<mma::BFloat16, 64>(entry, sizes, scale)                                        \
                        : run<mma::BFloat16, 128>(entry, sizes, scale)                                       \
      : dh == 32 ? run<mma::Half, 32>(entry, sizes, scale)                                                   \
      : dh == 64 ? run<mma::Half, 64>(entry, sizes, scale)                                                   \
                 : run<mma::Half, 128>(entry, sizes, scale);                                                 \
      *conflicts = mma::Block::bank_conflicts;                                                               \
    });                                                                                                      \
  }
