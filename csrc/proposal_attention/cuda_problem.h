// A request to the CUDA kernel, and how it is cut into blocks. No torch header here, nor CUDA's.
#pragma once

#include "cuda/mma_rows.h"

namespace zs3fast::proposal_attention {

using mma::Heads;

constexpr int kRows = 16;  // proposals of a block

template <int kDh>
constexpr int kWarps = kDh == 32 ? 8 : kDh == 64 ? 6 : 4;  // so that a multiprocessor's registers hold two blocks

template <class T>
struct Problem {
  int images, heads, proposals, patches;
  float scale;
  Heads<const T> q, k_self, v_self, k, v;
  const uint32_t* bits;                     // [images, proposals, ceil(patches / 32)]
  int64_t bits_image, bits_row, bits_word;  // strides
  Heads<T> output;
  float* lse;  // [images, heads, proposals]

  ZS3FAST_HD int tiles() const { return cuda::ceil_div(proposals, kRows); }  // of a head
  ZS3FAST_HD int64_t blocks() const { return int64_t{images} * heads * tiles(); }
};

}  // namespace zs3fast::proposal_attention
