// A request to the CUDA kernel, and how it is cut into blocks. No torch header here, nor CUDA's.
#pragma once

#include "cuda/mma_rows.h"

namespace zs3fast::region_bridge_attention {

using mma::Heads;

constexpr int kWarps = 4;
constexpr int kRows = 16 * kWarps;  // prefix and patch rows of a block
constexpr int kRegions = 16;        // region rows of a block

// Tokens are [prefix | h w patches | rh rw regions]; queries have `prefix_q` prefix rows, keys `prefix_k`.
template <class T>
struct Problem {
  int images, heads, prefix_q, prefix_k, h, w, rh, rw;
  float scale;
  Heads<const T> q, k, v;
  Heads<T> output;
  float* lse;  // [images, heads, queries]

  ZS3FAST_HD int patches() const { return h * w; }
  ZS3FAST_HD int regions() const { return rh * rw; }
  ZS3FAST_HD int rows() const { return prefix_q + h * w; }  // without regions
  ZS3FAST_HD int keys() const { return prefix_k + h * w; }
  ZS3FAST_HD int region_blocks() const { return cuda::ceil_div(regions(), kRegions); }  // of a head
  ZS3FAST_HD int row_blocks() const { return cuda::ceil_div(rows(), kRows); }
  ZS3FAST_HD int64_t blocks() const { return int64_t{images} * heads * (region_blocks() + row_blocks()); }
  ZS3FAST_HD float* lse_of(int head) const { return lse + int64_t{head} * (rows() + regions()); }
};

}  // namespace zs3fast::region_bridge_attention
