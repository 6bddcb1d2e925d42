// The general case: windows that overlap, a last resize, several classes a pixel.
//
// A task is a block of 8 x 16 output pixels. It reads, through the resize, a few canvas pixels of each
// window, and through those a small rectangle of patches. A class's score on the block is a mean of calibrated scores,
// each between those of the least and greatest logit interpolated there: the classes that cannot be among the top_k are left
// out, and the others are computed on the canvas pixels the block needs, averaged, resized and compared.
#pragma once

#include "carver.h"
#include "score.h"

namespace zs3fast::masks_to_labels::ZS3FAST_ISA {
namespace {

constexpr int64_t kBlockRows = 8, kBlockColumns = 16, kBlockPixels = kBlockRows * kBlockColumns;
constexpr int64_t kReadRows = 2 * kBlockRows, kReadColumns = 2 * kBlockColumns;  // canvas pixels a block can read
constexpr int64_t kNarrow = 4;                                              // patches side by side, read without gather
constexpr int64_t kPrunedTopK = 16;                                         // beyond, every class is evaluated

// The canvas coordinates one side of a block reads, each once, and where its pixels find theirs.
template <int64_t kPixels>
struct Reads {
  int64_t count;
  int32_t canvas[2 * kPixels];
  int32_t low[kPixels], high[kPixels];  // index into canvas
  float weight[kPixels];

  // Pixels beyond `pixels` repeat the last one.
  Reads(const Axis& axis, int64_t first, int64_t pixels) : count(0) {
    for (int64_t i = 0; i < kPixels; ++i) {
      const int64_t p = first + min(i, pixels - 1);
      weight[i] = axis.weight[p];
      low[i] = find_or_add(axis.low[p]);
      // a neighbour of no weight is not read: it may lie in a window that does not exist for this block
      high[i] = weight[i] == 0.0f ? low[i] : find_or_add(axis.high[p]);
    }
  }

 private:
  int32_t find_or_add(int32_t coordinate) {
    for (int64_t back = count - 1; back >= 0 && back >= count - 2; --back) {
      if (canvas[back] == coordinate) return static_cast<int32_t>(back);
    }
    canvas[count] = coordinate;
    return static_cast<int32_t>(count++);
  }
};

// How the columns of a view read a row of patches: as a product with a few columns of mostly zeros where the patches are
// few, else by index.
struct Columns {
  int64_t first, patches;
  int32_t low[kReadColumns], high[kReadColumns];  // from the first
  float weight[kReadColumns];
  float spread[kNarrow][kReadColumns];
};

// One window over one block: canvas pixels [row0, row1) x [column0, column1) of the reads lie in it.
struct View {
  int64_t window, row0, row1, column0, column1;
  float low[2], high[2];  // bounds of the weight of the unseen [0] and seen [1] group
  Columns columns;        // of the masks
  int32_t inside[kReadColumns];
  float weight[2][kReadRows][kReadColumns];
};

struct WindowScratch {
  float* upper;         // [classes]
  int32_t* candidates;  // [classes]
  float* column;        // [w]: one row of patches, interpolated vertically
  float* best;          // [top_k, kBlockPixels]
  int32_t* label;       // [top_k, kBlockPixels]
  View* views;          // [num_windows]

  WindowScratch(const Request& q, Carver& carver)
      : upper(carver.take<float>(q.classes)),
        candidates(carver.take<int32_t>(q.classes)),
        column(carver.take<float>(max(max(q.masks.w, q.trusty.w), kNarrow))),
        best(carver.take<float>(q.top_k * kBlockPixels)),
        label(carver.take<int32_t>(q.top_k * kBlockPixels)),
        views(carver.take<View>(q.num_windows)) {}
};

struct Block {
  int64_t y, x, rows, columns;  // output pixels
  Reads<kBlockRows> read_y;
  Reads<kBlockColumns> read_x;
  int64_t views;
  bool overlap;  // some canvas pixel lies in several windows
  float cover[kReadRows][kReadColumns];

  Block(const Request& q, int64_t y, int64_t x)
      : y(y),
        x(x),
        rows(min(kBlockRows, q.height - y)),
        columns(min(kBlockColumns, q.width - x)),
        read_y(q.resize_y, y, rows),
        read_x(q.resize_x, x, columns),
        views(0) {}
};

inline int64_t base_of(const Request& q, const Maps& maps, int64_t image, int64_t window, int64_t channel) {
  return (image * q.num_windows + window) * maps.row_stride + channel * maps.channel_stride;
}

// One side of a rectangle as the places where interpolated values can be extreme: its two ends and every patch between.
struct Extremes {
  const Axis& axis;
  int64_t first, last;  // crop pixels
  int64_t count() const { return axis.low[last] - axis.low[first] + 2; }
  int64_t low(int64_t i) const { return i == 0 ? axis.low[first] : i + 1 == count() ? axis.low[last] : axis.low[first] + i; }
  int64_t high(int64_t i) const { return i == 0 ? axis.high[first] : i + 1 == count() ? axis.high[last] : low(i); }
  float weight(int64_t i) const { return i == 0 ? axis.weight[first] : i + 1 == count() ? axis.weight[last] : 0.0f; }
};

// Least and greatest interpolated value in a rectangle of crop pixels, apart by what rounding can add; false if a patch
// is not finite.
inline bool value_bounds(
    const Maps& maps, int64_t base, const Extremes& y, const Extremes& x, float* __restrict column, float& least, float& greatest) {
  least = kInf, greatest = -kInf;
  float zero = 0, size = 0;
  const int64_t x0 = x.low(0), x1 = x.high(x.count() - 1);
  for (int64_t j = 0; j < y.count(); ++j) {
    const int64_t above = base + y.low(j) * maps.y_stride, below = base + y.high(j) * maps.y_stride;
    const float down = y.weight(j);
    for (int64_t i = x0; i <= x1; ++i) {
      const float a = load(maps, above + i * maps.x_stride), b = load(maps, below + i * maps.x_stride);
      column[i - x0] = a * (1 - down) + b * down;
      zero += (a + b) * 0.0f;
      size = max(size, max(abs(a), abs(b)));
    }
    for (int64_t i = 0; i < x.count(); ++i) {
      const float right = x.weight(i);
      const float value = column[x.low(i) - x0] * (1 - right) + column[x.high(i) - x0] * right;
      least = min(least, value);
      greatest = max(greatest, value);
    }
  }
  least -= 1e-6f * size, greatest += 1e-6f * size;
  return zero == 0.0f;
}

inline Extremes rows_of(const Axis& axis, const Block& block, const View& view, const int64_t* window) {
  return {axis, block.read_y.canvas[view.row0] - window[0], block.read_y.canvas[view.row1 - 1] - window[0]};
}

inline Extremes columns_of(const Axis& axis, const Block& block, const View& view, const int64_t* window) {
  return {axis, block.read_x.canvas[view.column0] - window[1], block.read_x.canvas[view.column1 - 1] - window[1]};
}

inline Columns table_of(const Extremes& x, const Block& block, const View& view) {
  Columns columns{};
  columns.first = x.low(0);
  columns.patches = x.high(x.count() - 1) - columns.first + 1;
  for (int64_t i = view.column0; i < view.column1; ++i) {
    const int64_t at = x.first + block.read_x.canvas[i] - block.read_x.canvas[view.column0];
    columns.low[i] = static_cast<int32_t>(x.axis.low[at] - columns.first);
    columns.high[i] = static_cast<int32_t>(x.axis.high[at] - columns.first);
    columns.weight[i] = x.axis.weight[at];
    if (columns.patches > kNarrow) continue;
    columns.spread[columns.low[i]][i] += 1 - columns.weight[i];
    columns.spread[columns.high[i]][i] += columns.weight[i];
  }
  return columns;
}

// Visits (row, column, logit) for the rows of a view and kLanes columns; those outside the view get any value.
template <int64_t kLanes, typename Visit>
inline void interpolate_view(
    const Maps& maps, int64_t base, const Axis& axis_y, const Block& block, const View& view, const Columns& columns,
    int64_t start, float* __restrict column, Visit visit) {
  for (int64_t x = columns.patches; x < kNarrow; ++x) column[x] = 0;
  for (int64_t j = view.row0; j < view.row1; ++j) {
    const int64_t y = block.read_y.canvas[j] - start;
    const int64_t above = base + axis_y.low[y] * maps.y_stride, below = base + axis_y.high[y] * maps.y_stride;
    const float down = axis_y.weight[y];
    float zero = 0;
    for (int64_t x = 0; x < columns.patches; ++x) {
      const int64_t at = (columns.first + x) * maps.x_stride;
      column[x] = load(maps, above + at) * (1 - down) + load(maps, below + at) * down;
      zero += column[x] * 0.0f;
    }
    if (columns.patches <= kNarrow && zero == 0.0f) {
      const float a = column[0], b = column[1], c = column[2], d = column[3];
#pragma GCC ivdep
      for (int64_t i = 0; i < kLanes; ++i) {
        visit(j, i, a * columns.spread[0][i] + b * columns.spread[1][i] + c * columns.spread[2][i] + d * columns.spread[3][i]);
      }
    } else {
#pragma GCC ivdep
      for (int64_t i = 0; i < kLanes; ++i) {
        visit(j, i, column[columns.low[i]] * (1 - columns.weight[i]) + column[columns.high[i]] * columns.weight[i]);
      }
    }
  }
}

inline void find_views(const Request& q, int64_t image, float* column, Block& block, View* views) {
  for (int64_t n = 0; n < q.num_windows; ++n) {
    const int64_t* window = q.windows + 2 * n;
    View& view = views[block.views];
    view.window = n;
    const auto inside = [](const int32_t* canvas, int64_t count, int64_t start, int64_t size, int64_t& first, int64_t& last) {
      for (first = 0; first < count && canvas[first] < start;) ++first;
      for (last = count; last > first && canvas[last - 1] >= start + size;) --last;
      return first < last;
    };
    if (!inside(block.read_y.canvas, block.read_y.count, window[0], q.crop_h, view.row0, view.row1)) continue;
    if (!inside(block.read_x.canvas, block.read_x.count, window[1], q.crop_w, view.column0, view.column1)) continue;
    view.low[0] = view.low[1] = view.high[0] = view.high[1] = 1.0f;
    if (q.weighted()) {
      float least, greatest;
      const bool finite = value_bounds(
          q.trusty, base_of(q, q.trusty, image, n, 0), rows_of(q.trusty_y, block, view, window),
          columns_of(q.trusty_x, block, view, window), column, least, greatest);
      const float low = finite ? sigmoid(least) : -kInf, high = finite ? sigmoid(greatest) : kInf;
      if (q.weigh_unseen) view.low[0] = low, view.high[0] = high;
      if (q.weigh_seen) view.low[1] = 1 - high, view.high[1] = 1 - low;
    }
    ++block.views;
  }
}

// Upper bounds of every class's score on a block, and the threshold a class must reach to be among its top_k.
inline float find_bounds(
    const Request& q, int64_t image, const Block& block, const View* views, float* column, float* upper) {
  float best[kPrunedTopK];
  const int64_t kept = q.top_k <= kPrunedTopK ? q.top_k : 0;
  for (int64_t i = 0; i < kept; ++i) best[i] = -kInf;
  for (int64_t c = 0; c < q.classes; ++c) {
    const uint8_t seen = q.seen[c];
    const float offset = seen ? q.seen_offset : 0.0f;
    float low = kInf, high = -kInf;
    for (int64_t v = 0; v < block.views; ++v) {
      const View& view = views[v];
      float least, greatest;
      const int64_t* window = q.windows + 2 * view.window;
      const bool finite = value_bounds(
          q.masks, base_of(q, q.masks, image, view.window, c), rows_of(q.masks_y, block, view, window),
          columns_of(q.masks_x, block, view, window), column, least, greatest);
      if (!finite || view.high[seen] == kInf) {
        low = -kInf, high = kInf;
        break;
      }
      const float a = sigmoid(least) - offset, b = sigmoid(greatest) - offset;
      const float slack = kRounding * (b + 2 * abs(offset)) * view.high[seen];
      low = min(low, a * (a > 0 ? view.low[seen] : view.high[seen]) - slack);
      high = max(high, b * (b > 0 ? view.high[seen] : view.low[seen]) + slack);
    }
    upper[c] = high;
    if (kept && low > best[kept - 1]) {
      int64_t i = kept - 1;
      for (; i > 0 && low > best[i - 1]; --i) best[i] = best[i - 1];
      best[i] = low;
    }
  }
  return kept ? best[kept - 1] : -kInf;
}

// What evaluation needs of a block and its views, and bounding does not.
inline void prepare(const Request& q, int64_t image, const WindowScratch& s, Block& block, View* views) {
  for (auto& row : block.cover) {
    for (float& value : row) value = 0;
  }
  for (int64_t v = 0; v < block.views; ++v) {
    View& view = views[v];
    const int64_t* window = q.windows + 2 * view.window;
    view.columns = table_of(columns_of(q.masks_x, block, view, window), block, view);
    for (int64_t i = 0; i < kReadColumns; ++i) view.inside[i] = i >= view.column0 && i < view.column1;
    for (int64_t j = view.row0; j < view.row1; ++j) {
      for (int64_t i = 0; i < kReadColumns; ++i) block.cover[j][i] += view.inside[i];
    }
    if (!q.weighted()) continue;
    const Columns columns = table_of(columns_of(q.trusty_x, block, view, window), block, view);
    interpolate_view<kReadColumns>(
        q.trusty, base_of(q, q.trusty, image, view.window, 0), q.trusty_y, block, view, columns, window[0], s.column,
        [&](int64_t j, int64_t i, float logit) {
          const float unseen = sigmoid(logit);
          view.weight[0][j][i] = q.weigh_unseen ? unseen : 1.0f;
          view.weight[1][j][i] = q.weigh_seen ? 1.0f - unseen : 1.0f;
        });
  }
  block.overlap = false;
  for (int64_t j = 0; j < block.read_y.count; ++j) {
    for (int64_t i = 0; i < block.read_x.count; ++i) block.overlap |= block.cover[j][i] > 1;
  }
}

// Mean score of one class on the canvas pixels the block reads.
template <int64_t kLanes>
inline void canvas_scores(
    const Request& q, int64_t image, const WindowScratch& s, const Block& block, const View* views, int64_t c,
    float (&total)[kReadRows][kReadColumns]) {
  const uint8_t seen = q.seen[c];
  const float offset = seen ? q.seen_offset : 0.0f;
  const bool weighted = q.weighted();
  for (int64_t j = 0; j < block.read_y.count; ++j) {
    for (int64_t i = 0; i < kLanes; ++i) total[j][i] = 0;
  }
  for (int64_t v = 0; v < block.views; ++v) {
    const View& view = views[v];
    const int64_t base = base_of(q, q.masks, image, view.window, c), start = q.windows[2 * view.window];
    const auto add = [&](auto weight) {
      interpolate_view<kLanes>(
          q.masks, base, q.masks_y, block, view, view.columns, start, s.column,
          [&](int64_t j, int64_t i, float logit) {
            const float score = weight(j, i, sigmoid(logit) - offset);
            total[j][i] += view.inside[i] ? score : 0.0f;
          });
    };
    if (weighted) {
      add([&](int64_t j, int64_t i, float score) { return score * view.weight[seen][j][i]; });
    } else {
      add([](int64_t, int64_t, float score) { return score; });
    }
  }
  if (!block.overlap) return;
  for (int64_t j = 0; j < block.read_y.count; ++j) {
    for (int64_t i = 0; i < kLanes; ++i) total[j][i] /= block.cover[j][i];
  }
}

// The last resize: horizontally each row read, then vertically.
inline void resize(const Block& block, const float (&total)[kReadRows][kReadColumns], float* __restrict scores) {
  float across[kReadRows][kBlockColumns];
  for (int64_t j = 0; j < block.read_y.count; ++j) {
    for (int64_t i = 0; i < kBlockColumns; ++i) {
      const float right = block.read_x.weight[i];
      across[j][i] = total[j][block.read_x.low[i]] * (1 - right) + total[j][block.read_x.high[i]] * right;
    }
  }
  for (int64_t j = 0; j < kBlockRows; ++j) {
    const float down = block.read_y.weight[j];
    const float* above = across[block.read_y.low[j]];
    const float* below = across[block.read_y.high[j]];
    for (int64_t i = 0; i < kBlockColumns; ++i) scores[j * kBlockColumns + i] = above[i] * (1 - down) + below[i] * down;
  }
}

// Puts the scores of class c where they belong among the top_k of each pixel; classes come in ascending order.
inline void rank(const Request& q, const WindowScratch& s, int32_t c, const float* __restrict scores) {
  float* __restrict best = s.best;
  int32_t* __restrict label = s.label;
  if (q.top_k == 1) {
    for (int64_t p = 0; p < kBlockPixels; ++p) {
      const bool better = beats(scores[p], best[p]);
      best[p] = better ? scores[p] : best[p];
      label[p] = better ? c : label[p];
    }
    return;
  }
  for (int64_t p = 0; p < kBlockPixels; ++p) {
    int64_t k = q.top_k;
    for (; k > 0 && beats(scores[p], best[(k - 1) * kBlockPixels + p]); --k) {
      if (k == q.top_k) continue;
      best[k * kBlockPixels + p] = best[(k - 1) * kBlockPixels + p];
      label[k * kBlockPixels + p] = label[(k - 1) * kBlockPixels + p];
    }
    if (k == q.top_k) continue;
    best[k * kBlockPixels + p] = scores[p];
    label[k * kBlockPixels + p] = c;
  }
}

inline void evaluate_block(
    const Request& q, int64_t image, const WindowScratch& s, Block& block, View* views, int64_t candidates) {
  prepare(q, image, s, block, views);
  for (int64_t p = 0; p < q.top_k * kBlockPixels; ++p) s.best[p] = -kInf;
  float total[kReadRows][kReadColumns], scores[kBlockPixels];
  for (int64_t k = 0; k < candidates; ++k) {
    const int32_t c = s.candidates[k];
    block.read_x.count <= kReadColumns / 2 ? canvas_scores<kReadColumns / 2>(q, image, s, block, views, c, total)
                                            : canvas_scores<kReadColumns>(q, image, s, block, views, c, total);
    resize(block, total, scores);
    rank(q, s, c, scores);
  }
}

inline void store_block(const Request& q, int64_t image, const WindowScratch& s, const Block& block) {
  for (int64_t k = 0; k < q.top_k; ++k) {
    for (int64_t j = 0; j < block.rows; ++j) {
      const int64_t at = ((image * q.top_k + k) * q.height + block.y + j) * q.width + block.x;
      const int64_t from = k * kBlockPixels + j * kBlockColumns;
      store_labels(q.labels, q.label_bytes, at, s.label + from, block.columns);
      if (!q.scores) continue;
      for (int64_t i = 0; i < block.columns; ++i) q.scores[at + i] = s.best[from + i];
      const int64_t nan = k == 0 ? count_nan(s.best + from, block.columns) : 0;
      if (nan) __atomic_fetch_add(q.nan_count + image, nan, __ATOMIC_RELAXED);
    }
  }
}

}  // namespace

Plan plan_windows(const Request& q) {
  Carver carver(nullptr);
  WindowScratch(q, carver);
  return {q.batch * ceil_div(q.height, kBlockRows) * ceil_div(q.width, kBlockColumns), carver.used()};
}

void run_windows(const Request& q, int64_t first, int64_t last, unsigned char* scratch) {
  Carver carver(scratch);
  const WindowScratch s(q, carver);
  const int64_t across = ceil_div(q.width, kBlockColumns), down = ceil_div(q.height, kBlockRows);
  for (int64_t task = first; task < last; ++task) {
    const int64_t image = task / (down * across);
    Block block(q, task / across % down * kBlockRows, task % across * kBlockColumns);
    find_views(q, image, s.column, block, s.views);
    const float threshold = find_bounds(q, image, block, s.views, s.column, s.upper);
    int64_t candidates = 0;
    for (int64_t c = 0; c < q.classes; ++c) {
      if (s.upper[c] >= threshold) s.candidates[candidates++] = static_cast<int32_t>(c);
    }
    if (candidates == 1 && !q.scores) {
      for (int64_t p = 0; p < kBlockPixels; ++p) s.label[p] = s.candidates[0];
    } else {
      evaluate_block(q, image, s, block, s.views, candidates);
    }
    store_block(q, image, s, block);
  }
}

}  // namespace zs3fast::masks_to_labels::ZS3FAST_ISA
