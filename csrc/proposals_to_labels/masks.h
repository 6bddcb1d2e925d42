// Masks over a tile: their patches, an interval for each, and their values at output pixels.
#pragma once

#include "proposals_to_labels/request.h"
#include "proposals_to_labels/arithmetic.h"

namespace zs3fast::proposals_to_labels {
namespace {

constexpr int64_t kLeafRows = 8, kLeafColumns = 32, kLeaf = kLeafRows * kLeafColumns;  // pixels evaluated at once
constexpr int64_t kPixels = 3 * kTile;  // image pixels a leaf reads in a row, and room to read whole vectors

// A rectangle of output pixels of a tile; beyond the image its pixels repeat the last ones.
struct Part {
  int64_t row, rows, column, columns;
};

template <typename T>
inline T load_as(const void* data, int64_t at) {
  return static_cast<const T*>(data)[at];
}

inline float load_patch(const Maps& maps, int64_t at) {
  switch (maps.element) {
    case Element::float32: return load_as<float>(maps.data, at);
    case Element::float16: return static_cast<float>(load_as<_Float16>(maps.data, at));
    default: {
      const uint32_t bits = static_cast<uint32_t>(load_as<uint16_t>(maps.data, at)) << 16;
      float x;
      std::memcpy(&x, &bits, sizeof x);
      return x;
    }
  }
}

// The patches of all proposals a tile reads, as floats: [proposals, rows, stride].
struct Patches {
  float* data;
  int64_t rows, stride;
  float largest;  // absolute value
  bool finite;

  const float* row(int64_t q, int64_t y) const { return data + (q * rows + y) * stride; }
};

inline void load_patches(const Request& request, int64_t image, const AxisTile& y, const AxisTile& x, Patches& patches) {
  const Maps& maps = request.maps;
  patches.rows = y.patches;
  patches.stride = round_up(x.patches);
  Float largest{}, zero{};
  // whole vectors as they lie; a narrow tile takes a few of its neighbour's patches with it
  const bool run = maps.element == Element::float32 && maps.x_stride == 1 && x.patch[0] + kLanes <= maps.w &&
                   x.patch[x.patches - 1] - x.patch[0] == x.patches - 1;
  const int64_t count = run && x.patches < kLanes ? kLanes : x.patches;
  for (int64_t q = 0; q < request.proposals; ++q) {
    for (int64_t j = 0; j < y.patches; ++j) {
      const int64_t from = image * maps.image_stride + q * maps.proposal_stride + y.patch[j] * maps.y_stride;
      float* to = patches.data + (q * patches.rows + j) * patches.stride;
      if (run) {
        const float* row = static_cast<const float*>(maps.data) + from + x.patch[0];
        for (int64_t i = 0; i + kLanes < count; i += kLanes) store(to + i, load(row + i));
        store(to + count - kLanes, load(row + count - kLanes));
      } else {
        for (int64_t i = 0; i < x.patches; ++i) to[i] = load_patch(maps, from + x.patch[i] * maps.x_stride);
      }
      for (int64_t i = count; i < patches.stride; ++i) to[i] = to[count - 1];
    }
    // not while they are written: a load that straddles two stores waits until both have left the store buffer
    const float* of_q = patches.row(q, 0);
    for (int64_t i = 0; i < patches.rows * patches.stride; i += kLanes) {
      const Float value = load(of_q + i);
      largest = max(largest, max(value, -value));
      zero += value * 0.0f;  // NaN if any is not finite
    }
  }
  patches.largest = greatest_of(largest);
  patches.finite = true;
  for (int i = 0; i < kLanes; ++i) patches.finite &= zero[i] == 0.0f;
}

// How the image pixels and the output pixels in the columns of a leaf are mixed, a vector at a time.
struct Columns {
  struct Mix {
    int64_t from;    // where the sources of this vector begin
    bool near;       // they all lie within two vectors from there
    Int low, high;   // relative to it
    Float weight;
  };
  int64_t first, pixels;      // image pixels read, as entries of the tile's list
  int64_t patch;              // the first patch they read
  Mix image[kPixels / kLanes];
  Mix output[kLeafColumns / kLanes];
};

inline Columns::Mix mix_of(const int32_t* low, const int32_t* high, const float* weight, int64_t first) {
  Columns::Mix mix;
  const Int lows = load(low), highs = load(high);
  mix.from = low[0] - first;
  mix.near = high[kLanes - 1] - low[0] < 2 * kLanes;
  mix.low = lows - low[0];
  mix.high = highs - low[0];
  mix.weight = load(weight);
  return mix;
}

inline Float mixed(const float* from, const Columns::Mix& mix) {
  from += mix.from;
  const Float low = mix.near ? select(from, mix.low) : gather(from, mix.low);
  const Float high = mix.near ? select(from, mix.high) : gather(from, mix.high);
  return low * (1.0f - mix.weight) + high * mix.weight;
}

inline Columns columns_of(const AxisTile& x, int64_t column) {
  Columns columns;
  columns.first = x.pixel_low[column];
  columns.pixels = x.pixel_high[column + kLeafColumns - 1] - columns.first + 1;
  columns.patch = x.patch_low[columns.first];
  for (int64_t i = 0; i < columns.pixels; i += kLanes) {
    const int64_t at = columns.first + i;
    columns.image[i / kLanes] = mix_of(x.patch_low + at, x.patch_high + at, x.patch_weight + at, columns.patch);
  }
  for (int64_t i = 0; i < kLeafColumns; i += kLanes) {
    const int64_t at = column + i;
    columns.output[i / kLanes] = mix_of(x.pixel_low + at, x.pixel_high + at, x.pixel_weight + at, columns.first);
  }
  return columns;
}

// Scratch of `evaluate`, rows of kPixels.
struct Rows {
  float* patches;  // [patches of a column], each mixed to the leaf's image pixels
  float* image;    // [2 * kLeafRows]
  float* outputs;  // [kLeafRows], mixed vertically
};

// Values of one proposal at the output pixels of a leaf: out[kLeafRows, kLeafColumns]. Every step runs over all rows before
// the next one reads them at other offsets, for the same reason.
inline void evaluate(
    const Request& request, const Patches& patches, int64_t q, const AxisTile& y, int64_t row, const Columns& columns,
    const Rows& rows, float* out) {
  const int64_t first = y.pixel_low[row], last = y.pixel_high[row + kLeafRows - 1];
  const float* image = rows.image;
  int64_t stride = kPixels;
  if (request.upsample) {
    const int64_t top = y.patch_low[first], bottom = y.patch_high[last];
    for (int64_t j = top; j <= bottom; ++j) {
      const float* from = patches.row(q, j) + columns.patch;
      float* to = rows.patches + (j - top) * kPixels;
      for (int64_t i = 0; i < columns.pixels; i += kLanes) store(to + i, mixed(from, columns.image[i / kLanes]));
    }
    for (int64_t j = first; j <= last; ++j) {
      const float* above = rows.patches + (y.patch_low[j] - top) * kPixels;
      const float* below = rows.patches + (y.patch_high[j] - top) * kPixels;
      const Float down = all(y.patch_weight[j]);
      float* to = rows.image + (j - first) * kPixels;
      for (int64_t i = 0; i < columns.pixels; i += kLanes)
        store(to + i, sigmoid(mix(load(above + i), load(below + i), down)));
    }
  } else if (request.logits) {
    for (int64_t j = first; j <= last; ++j) {
      const float* from = patches.row(q, j) + columns.first;
      float* to = rows.image + (j - first) * kPixels;
      for (int64_t i = 0; i < columns.pixels; i += kLanes) store(to + i, sigmoid(load(from + i)));
    }
  } else {
    image = patches.row(q, first) + columns.first;
    stride = patches.stride;
  }
  for (int64_t r = 0; r < kLeafRows; ++r) {
    const float* above = image + (y.pixel_low[row + r] - first) * stride;
    const float* below = image + (y.pixel_high[row + r] - first) * stride;
    const Float down = all(y.pixel_weight[row + r]);
    float* to = rows.outputs + r * kPixels;
    for (int64_t i = 0; i < columns.pixels; i += kLanes) store(to + i, mix(load(above + i), load(below + i), down));
  }
  for (int64_t r = 0; r < kLeafRows; ++r)
    for (int64_t i = 0; i < kLeafColumns; i += kLanes)
      store(out + r * kLeafColumns + i, mixed(rows.outputs + r * kPixels, columns.output[i / kLanes]));
}

// For every proposal the middle and the half width of an interval that holds its values on a part, rounding apart, and the
// greatest absolute value in it. Arrays of round_up(proposals) floats.
inline void find_intervals(
    const Request& request, const Patches& patches, const AxisTile& y, const AxisTile& x, const Part& part, float* middle,
    float* half, float* greatest) {
  int64_t y0 = y.pixel_low[part.row], y1 = y.pixel_high[part.row + part.rows - 1];
  int64_t x0 = x.pixel_low[part.column], x1 = x.pixel_high[part.column + part.columns - 1];
  if (request.upsample) {
    y0 = y.patch_low[y0], y1 = y.patch_high[y1];
    x0 = x.patch_low[x0], x1 = x.patch_high[x1];
  }
  const int64_t count = x1 - x0 + 1, whole = count / kLanes * kLanes;
  Int lane{};
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const Int last = all(static_cast<int32_t>(count - whole - 1));
  const Int inside = lane < last ? lane : last;
  for (int64_t q = 0; q < request.proposals; ++q) {
    Float low = all(kInf), high = all(-kInf);
    for (int64_t j = y0; j <= y1; ++j) {
      const float* from = patches.row(q, j) + x0;
      for (int64_t i = 0; i < whole; i += kLanes) low = min(low, load(from + i)), high = max(high, load(from + i));
      if (whole < count) {
        const Float rest = select(from + whole, inside);
        low = min(low, rest), high = max(high, rest);
      }
    }
    middle[q] = least_of(low);  // for now
    greatest[q] = greatest_of(high);
  }
  for (int64_t q = 0; q < request.proposals; q += kLanes) {
    Float low = load(middle + q), high = load(greatest + q);
    if (request.logits) low = sigmoid(low), high = sigmoid(high);
    store(middle + q, (low + high) * 0.5f);
    store(half + q, (high - low) * 0.5f);
    store(greatest + q, max(high, -low));
  }
}

}  // namespace
}  // namespace zs3fast::proposals_to_labels
