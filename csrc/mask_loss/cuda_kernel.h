// mask_loss on the GPU. Neither torch nor CUDA headers here: tests run this very code on the CPU.
//
//   z = (1-u)(1-v) a00 + (1-u) v a01 + u (1-v) a10 + u v a11        s = label == c ? -z : z
//   focal = (label == c ? alpha : 1 - alpha) sigmoid(s)^gamma softplus(s)
//
// Between four neighbouring grid points lies one cell of pixels, those at the border with their outer corners clamped.
// A tile is at most 16 x 16 pixels of a cell; a block goes along a strip of tiles of one image, with its labels in
// shared memory. A thread is a class: the four corners and the sums are registers, no value crosses threads, and where
// no label of four pixels is among the warp's classes, which is mostly so, the target's terms are not computed. Fewer
// than 17 classes leave lanes free: those take other rows of the tile, and their sums are added once a strip.
// A strip leaves 4 sums a class (forward), a tile 4 corners a class (backward); a second kernel adds them in a fixed
// order. Nothing is atomic, and equal inputs give equal bits.
//
// Prediction for an H100, B = 4, C = 156, 32 x 32 -> 512 x 512, int64 labels. Forward: 1.6e8 pixels and classes of 27
// instructions (counted in the sm_90a code), two of them exponential and reciprocal: 4.4e9 at 28e12 a second, 0.16 ms
// (the Triton kernel counts 37, 0.2 ms). Backward: 35 instructions, 0.2 ms. Memory: 2.6 MB of logits, 8.4 MB of labels,
// read once a group of 256 classes, and backward 11 MB of corners written and read: 0.01 ms at 3 TB/s, behind the
// arithmetic. Not yet run on a GPU.
#pragma once

#include "cuda/bands.h"
#include "cuda/block.h"
#include "cuda/element.h"

namespace zs3fast::mask_loss {

constexpr int kTile = 16;      // side of a tile of pixels
constexpr int kMaxWarps = 8;   // a block
constexpr int kSumThreads = 256;
constexpr int kSlices = kSumThreads / 32;  // of the rows that one class adds up

enum class Label : int32_t { uint8, int8, int16, int32, int64 };

struct CudaProblem {
  const void *logits, *labels;  // [B, C, h, w], [B, H, W]
  cuda::Element element;
  Label label;
  int64_t logits_b, logits_c, logits_y, logits_x, labels_b, labels_y, labels_x;  // strides
  int32_t images, classes;
  cuda::Axis rows, columns;
  float alpha, gamma;
  // how the work is cut, from plan()
  int32_t tiles_y, tiles_x;  // a cell
  int32_t lanes;             // classes a warp
  int32_t warps, groups;     // a block has warps * lanes classes, groups of blocks have all
  int32_t strip, strips;     // tiles side by side in one block, and blocks side by side

  ZS3FAST_HD int32_t tile_rows() const { return (rows.points + 1) * tiles_y; }
  ZS3FAST_HD int32_t tile_columns() const { return (columns.points + 1) * tiles_x; }
};

struct Gradients {
  const float *focal, *intersection, *prob;  // [B, C]
};

namespace gpu {

inline void plan(CudaProblem& q) {
  q.tiles_y = cuda::ceil_div(cuda::longest_band(q.rows), kTile);
  q.tiles_x = cuda::ceil_div(cuda::longest_band(q.columns), kTile);
  for (q.lanes = 2; q.lanes < 32 && q.lanes < q.classes;) q.lanes *= 2;
  const int32_t chunks = cuda::ceil_div(q.classes, q.lanes);
  q.groups = cuda::ceil_div(chunks, kMaxWarps);
  q.warps = cuda::ceil_div(chunks, q.groups);
  // some 2048 blocks: 15 a multiprocessor of an H100, so that the last of them cost little
  const int64_t tiles = static_cast<int64_t>(q.tile_rows()) * q.tile_columns() * q.images * q.groups;
  q.strip = static_cast<int32_t>(cuda::at_most<int64_t>(cuda::at_least<int64_t>(tiles / 2048, 1), q.tile_columns()));
  q.strips = cuda::ceil_div(q.tile_columns(), q.strip);
}

ZS3FAST_HD int32_t read_label(const CudaProblem& q, int64_t index) {
  int64_t label = 0;
  switch (q.label) {
    case Label::uint8: label = static_cast<const uint8_t*>(q.labels)[index]; break;
    case Label::int8: label = static_cast<const int8_t*>(q.labels)[index]; break;
    case Label::int16: label = static_cast<const int16_t*>(q.labels)[index]; break;
    case Label::int32: label = static_cast<const int32_t*>(q.labels)[index]; break;
    default: label = static_cast<const int64_t*>(q.labels)[index];
  }
  return label >= 0 && label < q.classes ? static_cast<int32_t>(label) : -1;
}

// log(1 + e) for 0 <= e <= 1, relative error 2e-7: a minimax polynomial of log(1 + e) / e, on units that have time.
ZS3FAST_HD float log1p_of(float e) {
  float p = fmaf(e, 5.23269411e-3f, -2.95052373e-2f);
  p = fmaf(p, e, 7.82259478e-2f);
  p = fmaf(p, e, -1.36632453e-1f);
  p = fmaf(p, e, 1.91060064e-1f);
  p = fmaf(p, e, -2.48429821e-1f);
  p = fmaf(p, e, 3.33190968e-1f);
  p = fmaf(p, e, -4.99994931e-1f);
  p = fmaf(p, e, 9.9999997e-1f);
  return p * e;
}

// What a pixel's terms are made of, with s = target ? -z : z: sigmoid(z), sigmoid(s), sigmoid(-s), sigmoid(s)^gamma and
// softplus(s).
struct Terms {
  float prob, wrong, right, power, softplus;
};

template <bool kSquare>
ZS3FAST_HD Terms terms(float z, bool target, float gamma) {
  constexpr float kLog2e = 1.44269504f;
  const float e = cuda::fast_exp2(fabsf(z) * -kLog2e), r = cuda::fast_reciprocal(1.0f + e), er = e * r;
  const float prob = z >= 0.0f ? r : er, rest = z >= 0.0f ? er : r, log_term = log1p_of(e);
  const float s = target ? -z : z;
  Terms x{prob, target ? rest : prob, target ? prob : rest, 0.0f, fmaxf(s, 0.0f) + log_term};
  x.power = kSquare ? x.wrong * x.wrong : cuda::fast_exp2(-gamma * kLog2e * (fmaxf(-s, 0.0f) + log_term));
  return x;
}

// A tile as all threads of a block see it.
struct Tile {
  int32_t labels[kTile * kTile];  // class, or -1
  uint8_t owners[kTile * kTile / 4];  // bit w: one of four pixels has a label among the classes of warp w
  float left[kTile], right[kTile], above[kTile], below[kTile];  // weights of the corners: of columns and of rows
};

// Where a block works: a row of tiles, a strip of it, an image, a group of classes.
struct Place {
  int32_t row, first, last, image, group;
};

template <class Block>
ZS3FAST_BODY Place place_of(const Block& block, const CudaProblem& q) {
  const int32_t first = block.x() % q.strips * q.strip;
  return {block.y(), first, cuda::at_most(first + q.strip, q.tile_columns()), block.z(), block.x() / q.strips};
}

// The pixels of one tile: `count` of them from `first` on, of band `band`.
struct Span {
  int32_t band, first, count;
};

ZS3FAST_HD Span span_of(const cuda::Axis& axis, int32_t tile, int32_t tiles) {
  const int32_t band = tile / tiles, first = cuda::first_pixel(axis, band) + tile % tiles * kTile;
  return {band, first, cuda::at_least(cuda::at_most(cuda::first_pixel(axis, band + 1) - first, kTile), 0)};
}

ZS3FAST_HD void stage(const CudaProblem& q, const Place& at, const Span& y, const Span& x, int thread, int threads,
                      Tile& tile) {
  for (int four = thread; four < kTile * kTile / 4; four += threads) {
    const int row = four * 4 / kTile, first = four * 4 % kTile;
    uint32_t owners = 0;
    ZS3FAST_UNROLL
    for (int column = first; column < first + 4; ++column) {
      if (row >= y.count || column >= x.count) continue;
      const int32_t label =
          read_label(q, at.image * q.labels_b + (y.first + row) * q.labels_y + (x.first + column) * q.labels_x);
      const int32_t warp = label / q.lanes - at.group * q.warps;
      if (label >= 0 && warp >= 0 && warp < q.warps) owners |= 1u << warp;
      tile.labels[row * kTile + column] = label;
    }
    tile.owners[four] = static_cast<uint8_t>(owners);
  }
  if (thread < kTile) {
    tile.below[thread] = cuda::distance(q.rows, y.band, y.first + thread);
    tile.right[thread] = cuda::distance(q.columns, x.band, x.first + thread);
    tile.above[thread] = 1.0f - tile.below[thread];
    tile.left[thread] = 1.0f - tile.right[thread];
  }
}

// The class of a thread, and which rows of the tile it takes: row, row + rows, ...
struct Lane {
  int32_t c, warp, row, rows;
};

ZS3FAST_HD Lane lane_of(const CudaProblem& q, int32_t group, int thread) {
  const int32_t warp = thread / 32, lane = thread % 32;
  return {(group * q.warps + warp) * q.lanes + lane % q.lanes, warp, lane / q.lanes, 32 / q.lanes};
}

struct Corners {
  float a00, a01, a10, a11;
};

// The corners of a cell, clamped to the grid.
ZS3FAST_HD Corners corners_of(const CudaProblem& q, int32_t image, int32_t c, int32_t band_y, int32_t band_x) {
  const int64_t plane = image * q.logits_b + c * q.logits_c;
  const int64_t above = plane + cuda::at_least(band_y - 1, 0) * q.logits_y;
  const int64_t below = plane + cuda::at_most(band_y, q.rows.points - 1) * q.logits_y;
  const int64_t left = cuda::at_least(band_x - 1, 0) * q.logits_x;
  const int64_t right = cuda::at_most(band_x, q.columns.points - 1) * q.logits_x;
  return {cuda::read(q.logits, q.element, above + left), cuda::read(q.logits, q.element, above + right),
          cuda::read(q.logits, q.element, below + left), cuda::read(q.logits, q.element, below + right)};
}

// Calls visit(z, x, target) for the pixels of a tile that a lane takes, four at a time; target is a constant false
// where none of the four can be the target of any class of the warp. next_row(y) comes behind the pixels of a row.
template <class NextRow, class Visit>
ZS3FAST_HD void for_each_pixel(const Tile& tile, const Lane& lane, const Corners& a, int32_t height, int32_t width,
                               NextRow next_row, Visit visit) {
  for (int32_t y = lane.row; y < height; y += lane.rows) {
    const float left = a.a00 * tile.above[y] + a.a10 * tile.below[y];
    const float right = a.a01 * tile.above[y] + a.a11 * tile.below[y];
    const int32_t* labels = tile.labels + y * kTile;
    const auto z = [&](int32_t x) { return left * tile.left[x] + right * tile.right[x]; };
    int32_t x = 0;
    for (; x + 4 <= width; x += 4) {
      if (tile.owners[(y * kTile + x) / 4] >> lane.warp & 1) {
        ZS3FAST_UNROLL
        for (int i = 0; i < 4; ++i) visit(z(x + i), x + i, labels[x + i] == lane.c);
      } else {
        ZS3FAST_UNROLL
        for (int i = 0; i < 4; ++i) visit(z(x + i), x + i, false);
      }
    }
    ZS3FAST_ONE_BY_ONE
    for (; x < width; ++x) visit(z(x), x, labels[x] == lane.c);
    next_row(y);
  }
}

// partial [4, B, tile_rows * strips, C]: focal, intersection, prob and target of each strip.
template <bool kSquare, class Block>
ZS3FAST_BODY void forward(const Block& block, const CudaProblem& q, Tile& tile, float* partial) {
  const Place at = place_of(block, q);
  const Span y = span_of(q.rows, at.row, q.tiles_y);
  cuda::PerThread<Block, float> focal(block), overlap(block), prob(block), count(block);
  block.alone([&](int thread) { focal[thread] = overlap[thread] = prob[thread] = count[thread] = 0.0f; });
  for (int32_t column = at.first; column < at.last; ++column) {
    const Span x = span_of(q.columns, column, q.tiles_x);
    block.each([&](int thread) { stage(q, at, y, x, thread, block.threads(), tile); });
    block.each([&](int thread) {
      const Lane lane = lane_of(q, at.group, thread);
      if (lane.c >= q.classes) return;
      const Corners corners = corners_of(q, at.image, lane.c, y.band, x.band);
      float negatives = 0.0f, positives = 0.0f, probs = 0.0f, overlaps = 0.0f;  // of a row: short sums of short sums
      for_each_pixel(
          tile, lane, corners, y.count, x.count,
          [&](int32_t) {
            focal[thread] += (1.0f - q.alpha) * negatives + q.alpha * positives;
            prob[thread] += probs, overlap[thread] += overlaps;
            negatives = positives = probs = overlaps = 0.0f;
          },
          [&](float z, int32_t, bool target) {
            const Terms t = terms<kSquare>(z, target, q.gamma);
            const float term = t.power * t.softplus;
            negatives += target ? 0.0f : term, probs += t.prob;
            if (target) positives += term, overlaps += t.prob, count[thread] += 1.0f;
          });
    });
  }
  block.warp_sum(focal, q.lanes);
  block.warp_sum(overlap, q.lanes);
  block.warp_sum(prob, q.lanes);
  block.warp_sum(count, q.lanes);
  block.alone([&](int thread) {
    const Lane lane = lane_of(q, at.group, thread);
    if (lane.c >= q.classes || lane.row != 0) return;
    const int64_t rows = static_cast<int64_t>(q.tile_rows()) * q.strips;
    const int64_t row = static_cast<int64_t>(at.row) * q.strips + at.first / q.strip;
    const int64_t step = q.images * rows * q.classes;
    float* out = partial + (at.image * rows + row) * q.classes + lane.c;
    out[0] = focal[thread], out[step] = overlap[thread], out[2 * step] = prob[thread], out[3 * step] = count[thread];
  });
}

// sums [4 B, C] of partial [4 B, rows, C]: a block takes 32 classes of one of 4 B.
template <class Block>
ZS3FAST_BODY void add_rows(const Block& block, const float* partial, float* sums, int64_t rows, int32_t classes,
                           float* shared) {
  const int32_t first = block.x() * 32;
  block.each([&](int thread) {
    const int32_t c = first + thread % 32;
    float total = 0.0f;
    for (int64_t row = thread / 32; c < classes && row < rows; row += kSlices) {
      total += partial[(block.y() * rows + row) * classes + c];
    }
    shared[thread] = total;
  });
  block.alone([&](int thread) {
    if (thread >= 32 || first + thread >= classes) return;
    float total = 0.0f;
    for (int slice = 0; slice < kSlices; ++slice) total += shared[slice * 32 + thread];
    sums[static_cast<int64_t>(block.y()) * classes + first + thread] = total;
  });
}

// corners [4, B, tile_rows * tile_columns, C]: what each tile gives to its cell's corners 00, 01, 10, 11.
template <bool kSquare, class Block>
ZS3FAST_BODY void backward(const Block& block, const CudaProblem& q, const Gradients& grad, Tile& tile,
                           float* corners) {
  const Place at = place_of(block, q);
  const Span y = span_of(q.rows, at.row, q.tiles_y);
  const int64_t tiles = static_cast<int64_t>(q.tile_rows()) * q.tile_columns(), step = q.images * tiles * q.classes;
  cuda::PerThread<Block, float> d00(block), d01(block), d10(block), d11(block);
  for (int32_t column = at.first; column < at.last; ++column) {
    const Span x = span_of(q.columns, column, q.tiles_x);
    block.each([&](int thread) { stage(q, at, y, x, thread, block.threads(), tile); });
    block.each([&](int thread) {
      d00[thread] = d01[thread] = d10[thread] = d11[thread] = 0.0f;
      const Lane lane = lane_of(q, at.group, thread);
      if (lane.c >= q.classes) return;
      const int64_t sum = static_cast<int64_t>(at.image) * q.classes + lane.c;
      const float of_focal = grad.focal[sum], of_overlap = grad.intersection[sum], of_prob = grad.prob[sum];
      const float of_negative = of_focal * (1.0f - q.alpha), of_positive = of_focal * -q.alpha;
      const Corners a = corners_of(q, at.image, lane.c, y.band, x.band);
      float to_left = 0.0f, to_right = 0.0f;  // of a row
      for_each_pixel(
          tile, lane, a, y.count, x.count,
          [&](int32_t row) {
            d00[thread] += tile.above[row] * to_left, d01[thread] += tile.above[row] * to_right;
            d10[thread] += tile.below[row] * to_left, d11[thread] += tile.below[row] * to_right;
            to_left = to_right = 0.0f;
          },
          [&](float z, int32_t i, bool target) {
            const Terms t = terms<kSquare>(z, target, q.gamma);
            const float slope = t.power * (q.gamma * t.right * t.softplus + t.wrong);
            const float dz = (target ? of_positive : of_negative) * slope +
                             (target ? of_prob + of_overlap : of_prob) * (t.wrong * t.right);
            to_left += dz * tile.left[i], to_right += dz * tile.right[i];
          });
    });
    block.warp_sum(d00, q.lanes);
    block.warp_sum(d01, q.lanes);
    block.warp_sum(d10, q.lanes);
    block.warp_sum(d11, q.lanes);
    block.alone([&](int thread) {
      const Lane lane = lane_of(q, at.group, thread);
      if (lane.c >= q.classes || lane.row != 0) return;
      const int64_t row = at.image * tiles + static_cast<int64_t>(at.row) * q.tile_columns() + column;
      float* out = corners + row * q.classes + lane.c;
      out[0] = d00[thread], out[step] = d01[thread], out[2 * step] = d10[thread], out[3 * step] = d11[thread];
    });
  }
}

// What the tiles of one cell give to one of its corners.
ZS3FAST_HD float cell_sum(const CudaProblem& q, const float* corners, int which, int32_t image, int32_t cell_y,
                          int32_t cell_x, int32_t c) {
  const int64_t tiles = static_cast<int64_t>(q.tile_rows()) * q.tile_columns();
  float total = 0.0f;
  for (int32_t i = 0; i < q.tiles_y; ++i) {
    for (int32_t j = 0; j < q.tiles_x; ++j) {
      const int64_t tile = static_cast<int64_t>(cell_y * q.tiles_y + i) * q.tile_columns() + cell_x * q.tiles_x + j;
      total += corners[((which * static_cast<int64_t>(q.images) + image) * tiles + tile) * q.classes + c];
    }
  }
  return total;
}

// grad [B, C, h, w] contiguous, in the type of the logits: a grid point is a corner of the cells before and behind it,
// and at the border of the outermost cell twice. A block takes one grid point, a thread a class.
template <class Block>
ZS3FAST_BODY void gather(const Block& block, const CudaProblem& q, const float* corners, void* grad) {
  const int32_t y = block.x() / q.columns.points, x = block.x() % q.columns.points, image = block.z();
  block.alone([&](int thread) {
    const int32_t c = block.y() * block.threads() + thread;
    if (c >= q.classes) return;
    float total = 0.0f;
    for (int32_t cell_y = y; cell_y <= y + 1; ++cell_y) {
      for (int32_t cell_x = x; cell_x <= x + 1; ++cell_x) {
        // this point as the corner above (0) or below (1), left (0) or right (1), of this cell
        for (int below = 0; below < 2; ++below) {
          if ((below ? cuda::at_most(cell_y, q.rows.points - 1) : cuda::at_least(cell_y - 1, 0)) != y) continue;
          for (int right = 0; right < 2; ++right) {
            if ((right ? cuda::at_most(cell_x, q.columns.points - 1) : cuda::at_least(cell_x - 1, 0)) != x) continue;
            total += cell_sum(q, corners, 2 * below + right, image, cell_y, cell_x, c);
          }
        }
      }
    }
    const int64_t points = static_cast<int64_t>(q.rows.points) * q.columns.points;
    cuda::write(grad, q.element, (static_cast<int64_t>(image) * q.classes + c) * points + block.x(), total);
  });
}

inline int gather_threads(const CudaProblem& q) { return cuda::at_most(cuda::ceil_div(q.classes, 32) * 32, 256); }

}  // namespace gpu
}  // namespace zs3fast::mask_loss
