// One window at its native size: every pixel is a bilinear mix of the four patches around it.
//
// A cell is the square between four neighbouring patch centres; it is cut into sub_x by sub_y pieces of about 8 x 4
// pixels. On a piece a class lies between the least and the greatest of its values at the four corners, and scores grow
// with logits inside the seen and inside the unseen group. So a class whose greatest value is below another's least in
// its group cannot win there, and only the few classes left are evaluated at every pixel.
#pragma once

#include "carver.h"
#include "score.h"

namespace zs3fast::masks_to_labels::ZS3FAST_ISA {
namespace {

constexpr int64_t kPieces = 32;  // pieces side by side in one task: candidates are collected in 32-bit masks
constexpr int64_t kTileRows = 4, kTileColumns = 8;

struct Cutting {
  int64_t sub_y, sub_x;  // pieces a cell
  int64_t cells;         // cells side by side in one task
  int64_t chunks;        // tasks side by side
};

inline Cutting cutting(const Request& q) {
  Cutting cut;
  cut.sub_y = min(ceil_div(q.height, q.masks.h * kTileRows), int64_t{64});
  cut.sub_x = min(ceil_div(q.width, q.masks.w * kTileColumns), kPieces);
  cut.cells = min(kPieces / cut.sub_x, q.masks.w);
  cut.chunks = ceil_div(q.masks.w, cut.cells);
  return cut;
}

struct Scratch {
  float* rows;          // [classes + 1, 2, cells + 1]: the patch rows above and below; the last is the trusty map
  float* upper;         // [classes, kPieces]: no value of the class in a piece is greater
  float* slack;         // [classes]: what rounding can add to a value; infinite if a value is not finite
  int32_t* candidates;  // [kPieces, classes]
  int32_t first[2];     // lowest unseen and seen class

  Scratch(const Request& q, const Cutting& cut, Carver& carver)
      : rows(carver.take<float>((q.classes + 1) * 2 * (cut.cells + 1))),
        upper(carver.take<float>(q.classes * kPieces)),
        slack(carver.take<float>(q.classes + 1)),
        candidates(carver.take<int32_t>(q.classes * kPieces)),
        first{-1, -1} {}
};

// Per piece, for the unseen [0] and the seen [1] group.
struct Limits {
  float lower[2][kPieces];     // some class of the group is nowhere smaller
  float greatest[2][kPieces];  // no class of the group is anywhere greater
  float threshold[2][kPieces];
};

inline void load_rows(const Request& q, const Maps& maps, int64_t base, int64_t y, int64_t x, int64_t count, float* out) {
  for (int64_t half = 0; half < 2; ++half, out += count) {
    const int64_t row = base + min(y + half, maps.h - 1) * maps.y_stride;
    const int64_t inside = min(count, q.masks.w - x);
    for (int64_t i = 0; i < inside; ++i) out[i] = load(maps, row + (x + i) * maps.x_stride);
    for (int64_t i = inside; i < count; ++i) out[i] = out[inside - 1];
  }
}

// Rounding slack of a class in the task, or infinity if any of its values is not finite.
inline float slack_of(const float* rows, int64_t count) {
  float greatest = 0, zero = 0;
  for (int64_t i = 0; i < count; ++i) {
    greatest = max(greatest, abs(rows[i]));
    zero += rows[i] * 0.0f;
  }
  return zero == 0.0f ? greatest * 1e-6f : kInf;
}

// Least and greatest value of one map on every piece of a strip of cells between the heights from and to.
inline void piece_bounds(
    const float* rows, const Cutting& cut, float from, float to, float* __restrict least, float* __restrict greatest) {
  const int64_t n = cut.cells;
  float top[kPieces + 1], bottom[kPieces + 1];
  for (int64_t j = 0; j <= n; ++j) {
    const float above = rows[j], step = rows[n + 1 + j] - above;
    top[j] = above + step * from;
    bottom[j] = above + step * to;
  }
  for (int64_t s = 0; s < cut.sub_x; ++s) {
    const float left = static_cast<float>(s) / cut.sub_x, right = static_cast<float>(s + 1) / cut.sub_x;
    for (int64_t j = 0; j < n; ++j) {
      const float step_top = top[j + 1] - top[j], step_bottom = bottom[j + 1] - bottom[j];
      const float a = top[j] + step_top * left, b = top[j] + step_top * right;
      const float c = bottom[j] + step_bottom * left, d = bottom[j] + step_bottom * right;
      least[s * n + j] = min(min(a, b), min(c, d));
      greatest[s * n + j] = max(max(a, b), max(c, d));
    }
  }
}

// A class needs a value of at least the threshold somewhere in the piece: below it, its score is strictly smaller than
// that of the class behind `lower`, rounding included, however flat the sigmoid or coarse the subtraction.
inline float threshold_of(float lower, float offset) {
  const float x = min(lower, 12.0f);
  const float away = kRounding * (1 + (1 + abs(offset)) * exp(x) + 2 * abs(offset) * exp(-x));
  return (x < -40.0f) | (away > 1.0f) ? -kInf : x - away;
}

struct Interval {
  float low, high;
};

inline Interval score_interval(float least, float greatest, float offset, float weight_low, float weight_high) {
  const float low = sigmoid(least) - offset, high = sigmoid(greatest) - offset;
  return {low * (low > 0 ? weight_low : weight_high), high * (high > 0 ? weight_high : weight_low)};
}

inline void find_limits(
    const Request& q, const Cutting& cut, const Scratch& s, float from, float to, Limits& limits) {
  const int64_t pieces = cut.cells * cut.sub_x;
  float least[kPieces];
  for (int g = 0; g < 2; ++g) {
    for (int64_t i = 0; i < kPieces; ++i) limits.lower[g][i] = limits.greatest[g][i] = -kInf;
  }
  for (int64_t c = 0; c < q.classes; ++c) {
    float* __restrict upper = s.upper + c * kPieces;
    float* __restrict group_lower = limits.lower[q.seen[c]];
    float* __restrict group_greatest = limits.greatest[q.seen[c]];
    const float slack = s.slack[c];
    if (slack == kInf) {
      for (int64_t i = 0; i < pieces; ++i) upper[i] = group_greatest[i] = kInf;
      continue;
    }
    piece_bounds(s.rows + c * 2 * (cut.cells + 1), cut, from, to, least, upper);
    for (int64_t i = 0; i < pieces; ++i) {
      upper[i] += slack;
      group_lower[i] = max(group_lower[i], least[i] - slack);
      group_greatest[i] = max(group_greatest[i], upper[i]);
    }
  }
}

// Weights of the unseen [0] and seen [1] scores, from the trusty probability.
inline void weights_of(const Request& q, float unseen, float* weight) {
  weight[0] = q.weigh_unseen ? unseen : 1.0f;
  weight[1] = q.weigh_seen ? 1.0f - unseen : 1.0f;
}

inline void find_thresholds(
    const Request& q, const Cutting& cut, const Scratch& s, float from, float to, Limits& limits) {
  const int64_t pieces = cut.cells * cut.sub_x;
  const float offset[2] = {0.0f, q.seen_offset};
  for (int g = 0; g < 2; ++g) {
    for (int64_t i = 0; i < pieces; ++i) limits.threshold[g][i] = threshold_of(limits.lower[g][i], offset[g]);
  }
  float least[kPieces], greatest[kPieces];
  const float slack = s.slack[q.classes];
  if (q.weighted()) {
    if (slack == kInf) {
      for (auto& threshold : limits.threshold) {
        for (int64_t i = 0; i < pieces; ++i) threshold[i] = -kInf;
      }
      return;
    }
    piece_bounds(s.rows + q.classes * 2 * (cut.cells + 1), cut, from, to, least, greatest);
  }
  for (int64_t i = 0; i < pieces; ++i) {
    float low[2] = {1, 1}, high[2] = {1, 1};
    if (q.weighted()) {
      weights_of(q, sigmoid(least[i] - slack), low);
      weights_of(q, sigmoid(greatest[i] + slack), high);
      const float swap = low[1];
      low[1] = high[1], high[1] = swap;
      // a weight that may be 0 makes all of its group equal, and one this small may too: the lowest index is needed
      for (int g = 0; g < 2; ++g) {
        if (low[g] > 1e-7f || s.first[g] < 0) continue;
        s.upper[s.first[g] * kPieces + i] = kInf;
        limits.greatest[g][i] = kInf;
        if (g == 0 && low[g] < 1e-18f) limits.threshold[g][i] = -kInf;
      }
    }
    for (int g = 0; g < 2; ++g) {
      const int other = 1 - g;
      const float scale = kRounding * (1 + abs(q.seen_offset));
      const Interval mine = score_interval(limits.lower[g][i], limits.greatest[g][i], offset[g], low[g], high[g]);
      const Interval theirs =
          score_interval(limits.lower[other][i], limits.greatest[other][i], offset[other], low[other], high[other]);
      if (limits.greatest[g][i] < kInf && limits.lower[other][i] > -kInf && mine.high + scale < theirs.low) {
        limits.threshold[g][i] = kInf;
      }
    }
  }
}

inline void find_candidates(const Request& q, const Scratch& s, int64_t pieces, const Limits& limits, int32_t* counts) {
  for (int64_t i = 0; i < kPieces; ++i) counts[i] = 0;
  for (int64_t c = 0; c < q.classes; ++c) {
    const float* __restrict upper = s.upper + c * kPieces;
    const float* __restrict threshold = limits.threshold[q.seen[c]];
    uint32_t mask = 0;
    for (uint32_t i = 0; i < kPieces; ++i) mask |= static_cast<uint32_t>(upper[i] >= threshold[i]) << i;
    if (pieces < kPieces) mask &= (uint32_t{1} << pieces) - 1;
    for (; mask; mask &= mask - 1) {
      const int64_t i = __builtin_ctz(mask);
      s.candidates[i * q.classes + counts[i]++] = static_cast<int32_t>(c);
    }
  }
}

struct Tile {
  float y[kTileRows], x[kTileColumns];  // weights of the patch below and right
  float weight[2][kTileRows][kTileColumns];
  float best[kTileRows][kTileColumns];
  int32_t label[kTileRows][kTileColumns];
};

// corners: the class's two rows at the cell, `below` elements apart.
template <typename Visit>
inline void interpolate(const Tile& tile, const float* corners, int64_t below, Visit visit) {
  for (int64_t r = 0; r < kTileRows; ++r) {
    const float left = corners[0] * (1 - tile.y[r]) + corners[below] * tile.y[r];
    const float right = corners[1] * (1 - tile.y[r]) + corners[below + 1] * tile.y[r];
#pragma GCC ivdep
    for (int64_t i = 0; i < kTileColumns; ++i) visit(r, i, left * (1 - tile.x[i]) + right * tile.x[i]);
  }
}

template <bool kWeighted>
inline void evaluate(
    const Request& q, const Scratch& s, const Cutting& cut, int64_t cell, const int32_t* candidates, int64_t count, Tile& tile) {
  const int64_t below = cut.cells + 1;
  if (kWeighted) {
    interpolate(tile, s.rows + q.classes * 2 * below + cell, below, [&](int64_t r, int64_t i, float logit) {
      const float unseen = sigmoid(logit);
      tile.weight[0][r][i] = q.weigh_unseen ? unseen : 1.0f;
      tile.weight[1][r][i] = q.weigh_seen ? 1.0f - unseen : 1.0f;
    });
  }
  for (int64_t r = 0; r < kTileRows; ++r) {
    for (int64_t i = 0; i < kTileColumns; ++i) tile.best[r][i] = -kInf;
  }
  for (int64_t k = 0; k < count; ++k) {
    const int32_t c = candidates[k];
    const uint8_t seen = q.seen[c];
    const float offset = seen ? q.seen_offset : 0.0f;
    interpolate(tile, s.rows + c * 2 * below + cell, below, [&](int64_t r, int64_t i, float logit) {
      float score = sigmoid(logit) - offset;
      if (kWeighted) score *= tile.weight[seen][r][i];
      const bool better = beats(score, tile.best[r][i]);
      tile.best[r][i] = better ? score : tile.best[r][i];
      tile.label[r][i] = better ? c : tile.label[r][i];
    });
  }
}

// Pixels [y0, y1) x [x0, x1), all in one piece.
inline void finish_piece(
    const Request& q, const Scratch& s, const Cutting& cut, int64_t image, int64_t cell, int64_t y0, int64_t y1, int64_t x0,
    int64_t x1, const int32_t* candidates, int64_t count) {
  const bool details = q.scores != nullptr;
  Tile tile;
  for (int64_t x = x0; x < x1; x += kTileColumns) {
    const int64_t columns = min(kTileColumns, x1 - x);
    for (int64_t i = 0; i < kTileColumns; ++i) tile.x[i] = q.masks_x.weight[x + min(i, columns - 1)];
    for (int64_t y = y0; y < y1; y += kTileRows) {
      const int64_t rows = min(kTileRows, y1 - y);
      if (count == 1 && !details) {
        for (auto& row : tile.label) {
          for (int32_t& label : row) label = candidates[0];
        }
      } else {
        for (int64_t r = 0; r < kTileRows; ++r) tile.y[r] = q.masks_y.weight[y + min(r, rows - 1)];
        q.weighted() ? evaluate<true>(q, s, cut, cell, candidates, count, tile)
                     : evaluate<false>(q, s, cut, cell, candidates, count, tile);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (image * q.height + y + r) * q.width + x;
        store_labels(q.labels, q.label_bytes, at, tile.label[r], columns);
        if (!details) continue;
        for (int64_t i = 0; i < columns; ++i) q.scores[at + i] = tile.best[r][i];
        const int64_t nan = count_nan(tile.best[r], columns);
        if (nan) __atomic_fetch_add(q.nan_count + image, nan, __ATOMIC_RELAXED);
      }
    }
  }
}

// First coordinate in [0, count) whose patch and piece are at least the given ones; both grow with the coordinate.
inline int64_t first_at(const Axis& axis, int64_t count, int64_t patch, int64_t piece, int64_t pieces) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    const int64_t its_piece = min(static_cast<int64_t>(axis.weight[middle] * pieces), pieces - 1);
    const bool before = axis.low[middle] < patch || (axis.low[middle] == patch && its_piece < piece);
    before ? low = middle + 1 : high = middle;
  }
  return low;
}

inline void run_task(const Request& q, const Cutting& cut, const Scratch& s, int64_t task) {
  const int64_t image = task / (q.masks.h * cut.chunks), cell_y = task / cut.chunks % q.masks.h;
  const int64_t cell_x = task % cut.chunks * cut.cells;
  if (first_at(q.masks_y, q.height, cell_y, 0, 1) == first_at(q.masks_y, q.height, cell_y + 1, 0, 1)) return;

  const int64_t row = 2 * (cut.cells + 1);
  for (int64_t c = 0; c < q.classes; ++c) {
    const int64_t base = image * q.masks.row_stride + c * q.masks.channel_stride;
    load_rows(q, q.masks, base, cell_y, cell_x, cut.cells + 1, s.rows + c * row);
    s.slack[c] = slack_of(s.rows + c * row, row);
  }
  if (q.weighted()) {
    load_rows(q, q.trusty, image * q.trusty.row_stride, cell_y, cell_x, cut.cells + 1, s.rows + q.classes * row);
    s.slack[q.classes] = slack_of(s.rows + q.classes * row, row);
  }

  int64_t columns[kPieces + 1];  // piece p of cell j starts at columns[j * sub_x + p]
  const int64_t pieces = cut.cells * cut.sub_x;
  for (int64_t i = 0; i <= pieces; ++i) {
    columns[i] = first_at(q.masks_x, q.width, cell_x + i / cut.sub_x, i % cut.sub_x, cut.sub_x);
  }
  Limits limits;
  int32_t counts[kPieces];
  for (int64_t p = 0; p < cut.sub_y; ++p) {
    const int64_t y0 = first_at(q.masks_y, q.height, cell_y, p, cut.sub_y);
    const int64_t y1 = p + 1 < cut.sub_y ? first_at(q.masks_y, q.height, cell_y, p + 1, cut.sub_y)
                                         : first_at(q.masks_y, q.height, cell_y + 1, 0, cut.sub_y);
    if (y0 == y1) continue;
    const float from = static_cast<float>(p) / cut.sub_y, to = static_cast<float>(p + 1) / cut.sub_y;
    find_limits(q, cut, s, from, to, limits);
    find_thresholds(q, cut, s, from, to, limits);
    find_candidates(q, s, pieces, limits, counts);
    for (int64_t j = 0; j < cut.cells; ++j) {
      for (int64_t i = 0; i < cut.sub_x; ++i) {
        const int64_t x0 = columns[j * cut.sub_x + i], x1 = columns[j * cut.sub_x + i + 1], piece = i * cut.cells + j;
        finish_piece(q, s, cut, image, j, y0, y1, x0, x1, s.candidates + piece * q.classes, counts[piece]);
      }
    }
  }
}

}  // namespace

Plan plan_one_window(const Request& q) {
  const Cutting cut = cutting(q);
  Carver carver(nullptr);
  Scratch(q, cut, carver);
  return {q.batch * q.masks.h * cut.chunks, carver.used()};
}

void run_one_window(const Request& q, int64_t first, int64_t last, unsigned char* scratch) {
  const Cutting cut = cutting(q);
  Carver carver(scratch);
  Scratch s(q, cut, carver);
  for (int64_t c = q.classes - 1; c >= 0; --c) s.first[q.seen[c]] = static_cast<int32_t>(c);
  for (int64_t task = first; task < last; ++task) run_task(q, cut, s, task);
}

}  // namespace zs3fast::masks_to_labels::ZS3FAST_ISA
