// Where the rows of tensors lie for the tensor-core kernels. Neither torch nor anything of a GPU here.
#pragma once

#include "cuda/host_device.h"

namespace zs3fast::mma {

// Rows of neighbouring columns, `stride` elements apart.
template <class T>
struct Rows {
  T* data;
  int64_t stride;

  ZS3FAST_HD Rows from(int64_t row) const { return {data + row * stride, stride}; }
};

// [B, heads, tokens, dh] with neighbouring columns; strides in elements. Vectors of 16 bytes are read: data and strides
// are multiples of them.
template <class T>
struct Heads {
  T* data;
  int64_t image, head, token;

  ZS3FAST_HD Rows<T> of(int64_t b, int64_t a) const { return {data + b * image + a * head, token}; }
};

}  // namespace zs3fast::mma
