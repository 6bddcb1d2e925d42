// refine_maps on the CPU: rows of a tile, on raw pointers and strides. No torch header here.
//
// A tile is a rectangle of the image. Its maps are planes whose rows have room on both sides, filled with the row's
// ends, so that a neighbour beyond the image is an ordinary load; rows above and below are found by their pointer.
// The weights of a row of pixels lie together, [y][neighbour][x]: they are read once for all names of a chunk.
#pragma once

#include <cstdint>

namespace zs3fast::refine_maps {

constexpr int64_t kColumns = 32;    // a row is a multiple of this: what the widest kernel computes at once
constexpr int64_t kMostNames = 16;  // of a chunk

struct Tile {
  int64_t rows, cols, pad;  // pad: room beside a row
  int64_t stride, plane;    // floats from row to row, from plane to plane; a plane's pointer is its pixel (0, 0)
  int64_t weight_cols;      // cols rounded up
};

// The eight neighbours of each dilation, in the order of their weights.
struct Neighbours {
  int64_t count;        // 8 a dilation
  const int32_t *dy, *dx;  // [count]
};

// Bilinear taps of one axis: from[i] + part * (from[next] - from[i]).
struct Taps {
  const int32_t *low, *high;
  const float* part;
};

// What is known of a pixel's names so far, each [rows * cols] of the tile's core.
struct Best {
  float* value;      // the best of the names that may win
  int32_t* label;
  float *largest, *sum;  // of all names: sum of exp(scale * (value - largest)); sum is null where it is not asked for
};

// One build an instruction set, each in its own translation unit.
struct Kernels {
  // Row y of a plane from the rows low and high of a smaller map, and what lies beside it.
  void (*resize)(const Tile&, const float* low, const float* high, float part, const Taps& columns, float* row);
  // weights[k][x] of row y: softmax over k of the mean over channels of -|x - x(k)| / (1e-8 + 0.1 std).
  void (*weigh)(const Tile&, const Neighbours&, const float* image, int64_t channels, int64_t y, float* weights,
                float* scratch);
  // Row y, columns [x0, x1), of `names` planes: to = sum over k of weights[k] * from(k).
  void (*step)(const Tile&, const Neighbours&, const float* weights, const float* from, float* to, int64_t names,
               int64_t y, int64_t x0, int64_t x1);
  // One row of n pixels of `names` planes into what is known of them; names first, first + 1, ...
  void (*fold)(const float* from, int64_t plane, int64_t names, int64_t first, const bool* excluded, float scale,
               int64_t n, const Best&);
};

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

}  // namespace zs3fast::refine_maps
