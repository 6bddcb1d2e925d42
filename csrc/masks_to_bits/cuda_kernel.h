// masks_to_bits on the GPU: a thread makes a bit, a warp the word that its 32 threads vote for. Neither torch nor CUDA
// headers here: tests run this very code on the CPU.
//
// A bit is a mean of four pixels of the padded size, and of logits each pixel a sigmoid of a mean of four. The 16 reads
// do not depend on each other, so a thread has all of them in flight; the sizes of both resizes are arithmetic on
// arguments, and no table is made or copied.
//
// Prediction for an H100, 100 masks of 160 x 216 fp32 logits to 30 x 30 patches: the rows that a patch reads are 4 of
// every 5.3, all of their 32-byte sectors are touched, 10 MB at 3 TB/s are 3.5 us; 90,000 bits of some 250 instructions
// are 1 us of the 132 x 128 lanes. A launch takes as long. Not yet run on a GPU.
#pragma once

#include "cuda/block.h"
#include "cuda/element.h"

namespace zs3fast::masks_to_bits {

constexpr int kThreads = 128;

// One axis of a bilinear resize, `out` places over `in`. scale is torch's fp32 ratio of sizes.
struct Resize {
  int32_t in, out;
  float scale;
  bool align_corners;
};

struct CudaRequest {
  const void* masks;
  int64_t stride_b, stride_q, stride_y, stride_x;
  int32_t count, proposals;          // masks in all, and of an image
  int32_t grid_w, patches, words;    // of a mask
  bool logits;
  Resize padded_y, padded_x;  // logits -> padded size
  Resize grid_y, grid_x;      // padded size -> grid
  uint32_t* bits;             // [count, words]
};

namespace gpu {

inline Resize resize(int64_t in, int64_t out, bool align_corners) {
  const float scale = !align_corners ? static_cast<float>(in) / static_cast<float>(out)
                      : out > 1      ? static_cast<float>(in - 1) / static_cast<float>(out - 1)
                                     : 0.0f;
  return {static_cast<int32_t>(in), static_cast<int32_t>(out), scale, align_corners};
}

// Where output place i reads: two neighbours and the weight of the second.
struct Source {
  int32_t low, high;
  float weight;
};

// torch's own fp32 coordinates, rounding included (one fused multiply-add): a mask with hard edges changes a patch's
// mean by as much as its coordinate is off.
ZS3FAST_HD Source source(const Resize& axis, int32_t i) {
  const float place = static_cast<float>(i);
  const float at = axis.in == axis.out    ? place
                   : axis.align_corners ? axis.scale * place
                                        : fmaxf(0.0f, fmaf(axis.scale, place + 0.5f, -0.5f));
  const int32_t low = cuda::at_most(static_cast<int32_t>(at), axis.in - 1);
  return {low, cuda::at_most(low + 1, axis.in - 1), fminf(fmaxf(at - static_cast<float>(low), 0.0f), 1.0f)};
}

ZS3FAST_HD float blend(float a, float b, float c, float d, float down, float right) {
  return (a * (1.0f - right) + b * right) * (1.0f - down) + (c * (1.0f - right) + d * right) * down;
}

// 1 / (1 + e^-x): 0 and 1 far from 0, NaN of NaN.
ZS3FAST_HD float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Pixel (y, x) of the soft mask at the padded size.
template <class T, bool kLogits>
ZS3FAST_HD float pixel(const CudaRequest& q, const T* map, int32_t y, int32_t x) {
  if constexpr (!kLogits) return cuda::to_float(map[y * q.stride_y + x * q.stride_x]);
  const Source rows = source(q.padded_y, y), columns = source(q.padded_x, x);
  const T *above = map + rows.low * q.stride_y, *below = map + rows.high * q.stride_y;
  const int64_t left = columns.low * q.stride_x, right = columns.high * q.stride_x;
  return sigmoid(blend(cuda::to_float(above[left]), cuda::to_float(above[right]), cuda::to_float(below[left]),
                       cuda::to_float(below[right]), rows.weight, columns.weight));
}

// Whether mask `mask` keeps patch n. NaN keeps nothing.
template <class T, bool kLogits>
ZS3FAST_HD bool keeps(const CudaRequest& q, int32_t mask, int32_t n) {
  const T* map = static_cast<const T*>(q.masks) + mask / q.proposals * q.stride_b + mask % q.proposals * q.stride_q;
  const Source rows = source(q.grid_y, n / q.grid_w), columns = source(q.grid_x, n % q.grid_w);
  const auto at = [&](int32_t y, int32_t x) { return pixel<T, kLogits>(q, map, y, x); };
  return blend(at(rows.low, columns.low), at(rows.low, columns.high), at(rows.high, columns.low),
               at(rows.high, columns.high), rows.weight, columns.weight) >= 0.5f;
}

template <class T, bool kLogits, class Block>
ZS3FAST_BODY void make_words(const Block& block, const CudaRequest& q) {
  const int32_t mask = block.x(), first = block.y() * (kThreads / 32);
  cuda::PerThread<Block, uint32_t> word(block);
  block.ballot(word, [&](int thread) {
    const int32_t n = first * 32 + thread;
    return n < q.patches && keeps<T, kLogits>(q, mask, n);
  });
  block.alone([&](int thread) {
    const int32_t at = first + thread / 32;
    if (thread % 32 == 0 && at < q.words) q.bits[static_cast<int64_t>(mask) * q.words + at] = word[thread];
  });
}

// One block: kThreads patches of one mask.
inline int32_t blocks_x(const CudaRequest& q) { return q.count; }
inline int32_t blocks_y(const CudaRequest& q) { return cuda::ceil_div(q.words, kThreads / 32); }

}  // namespace gpu
}  // namespace zs3fast::masks_to_bits
