// refine_maps, CPU: maps spread over neighbours that look alike, tile by tile and some names at a time.
//
// A tile with a halo of steps * the largest dilation holds its weights [y][neighbour][x], its image and two planes a name
// of a chunk; from step to step the rectangle that is still needed shrinks towards the tile's core. Images up to some
// two million pixels are one tile. Labels are found as chunks come by: of each pixel the best name so far, and the sum.
//
// Threads take names where the planes of several chunks fit in kPlaneBytes, and never wait for each other; otherwise
// they take rows of one chunk and meet after every step.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "isa.h"
#include "refine_maps/kernel.h"

namespace zs3fast::refine_maps {
namespace {

constexpr int64_t kTileBytes = int64_t{256} << 20;  // weights, image and planes of a tile, where its halo leaves room
constexpr int64_t kPlaneBytes = int64_t{48} << 20;  // planes of the chunks of all threads
constexpr int64_t kNames = 8;                       // of a chunk: its planes and the weights of a row fit the L2 cache
constexpr int64_t kFewNames = 4;                    // fewer a chunk read the weights too often
static_assert(kNames <= kMostNames);

const Kernels& kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::avx512: return kernels_avx512;
    case Isa::avx2: return kernels_avx2;
    default: break;
  }
#endif
  return kernels_baseline;
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(new (std::align_val_t(64)) T[std::max<int64_t>(count, 1)]) {}
  ~Buffer() { ::operator delete[](data_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  T* data() const { return data_; }

 private:
  T* data_;
};

struct Range {
  int64_t first, end;
  int64_t size() const { return end - first; }
  Range grown(int64_t by, int64_t length) const {
    return {std::max<int64_t>(first - by, 0), std::min(end + by, length)};
  }
  Range from(const Range& other) const { return {first - other.first, end - other.first}; }
};

// Bilinear, align_corners = false: where the pixels `range` of `size` lie between those of `old`, in halves of 1 / size.
// What has weight 0 is not looked at: it may be NaN.
struct Axis {
  std::vector<int32_t> low, high;
  std::vector<float> part;
  bool copies;  // sizes agree

  Axis(int64_t old, int64_t size, const Range& range) : copies(old == size) {
    for (int64_t i = range.first; i < range.end; ++i) {
      const int64_t at = std::max<int64_t>((2 * i + 1) * old - size, 0);
      const int64_t below = std::min(at / (2 * size), old - 1), beyond = at - below * 2 * size;
      low.push_back(static_cast<int32_t>(below));
      high.push_back(static_cast<int32_t>(copies || beyond == 0 ? below : std::min(below + 1, old - 1)));
      part.push_back(static_cast<float>(static_cast<double>(beyond) / static_cast<double>(2 * size)));
    }
  }
};

// A tile's rows of `count` maps [h, w] of neighbouring rows, resized to the image's size.
void fill(const Kernels& kernel, const Tile& tile, const Axis& y, const Axis& x, const at::Tensor& maps, float* planes) {
  const float* data = maps.data_ptr<float>();
  const int64_t h = maps.size(-2), w = maps.size(-1), count = maps.numel() / std::max<int64_t>(h * w, 1);
  const Taps columns = x.copies ? Taps{nullptr, nullptr, nullptr} : Taps{x.low.data(), x.high.data(), x.part.data()};
  const int64_t shift = x.copies ? x.low[0] : 0;
  at::parallel_for(0, count * tile.rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % tile.rows;
      const float* map = data + i / tile.rows * h * w + shift;
      kernel.resize(tile, map + y.low[row] * w, map + y.high[row] * w, y.part[row], columns,
                    planes + i / tile.rows * tile.plane + row * tile.stride);
    }
  });
}

struct Request {
  at::IntArrayRef size, crop, canvas, windows;
  int64_t steps, reach;  // reach: the largest dilation
  Neighbours near;
};

// Names [first, first + count) of one image, fp32 on the smallest grid that resizing to the image's size starts from:
// windows lie on the canvas, their mean is taken there.
at::Tensor chunk_of(const Request& r, const at::Tensor& maps, int64_t first, int64_t count) {
  auto chunk = maps.narrow(1, first, count).to(at::kFloat);  // [n, count, h, w]
  const auto resized = [&](int64_t window) {
    const auto maps_of = chunk.select(0, window).contiguous();
    if (maps_of.size(-2) == r.crop[0] && maps_of.size(-1) == r.crop[1]) return maps_of;
    const int64_t stride = round_up(r.crop[1], kColumns);
    const Tile tile{r.crop[0], r.crop[1], 0, stride, r.crop[0] * stride, stride};
    auto planes = at::empty({count, r.crop[0], stride}, chunk.options());
    fill(kernels(), tile, Axis(maps_of.size(-2), r.crop[0], {0, r.crop[0]}),
         Axis(maps_of.size(-1), r.crop[1], {0, r.crop[1]}), maps_of, planes.data_ptr<float>());
    return planes.narrow(2, 0, r.crop[1]);
  };
  const bool one = r.windows.size() == 2 && r.crop == r.canvas;
  if (one) return r.crop == r.size ? chunk.select(0, 0).contiguous() : resized(0).contiguous();
  auto total = at::zeros({count, r.canvas[0], r.canvas[1]}, chunk.options());
  auto cover = at::zeros({r.canvas[0], r.canvas[1]}, chunk.options());
  for (size_t i = 0; i < r.windows.size() / 2; ++i) {
    const auto part = [&](const at::Tensor& x) {
      return x.narrow(-2, r.windows[2 * i], r.crop[0]).narrow(-1, r.windows[2 * i + 1], r.crop[1]);
    };
    part(total).add_(resized(static_cast<int64_t>(i)));
    part(cover).add_(1);
  }
  return total.div_(cover);
}

// The cores that together are [0, length), as long as `room` pixels with a halo on both sides allow.
std::vector<Range> cores(int64_t length, int64_t room, int64_t halo) {
  const int64_t longest = length <= room ? length : std::max<int64_t>({room - 2 * halo, halo, 64});
  const int64_t count = (length + longest - 1) / longest, step = (length + count - 1) / count;
  std::vector<Range> found;
  for (int64_t first = 0; first < length; first += step) found.push_back({first, std::min(first + step, length)});
  return found;
}

struct Rule {
  const bool* excluded;
  double scale;     // 0: scores are the maps' own values
  int32_t* labels;  // [H, W] of one image
  float* scores;
};

// What is known of the names of a core's pixels, in rows of whole vectors.
class State {
 public:
  State(const Range& rows, const Range& cols, const Rule* rule, int64_t names)
      : stride_(round_up(cols.size(), kColumns)), count_(rule == nullptr ? 0 : rows.size() * stride_), value_(count_),
        largest_(count_), sum_(count_), label_(count_) {
    std::fill_n(value_.data(), count_, -std::numeric_limits<float>::infinity());
    std::fill_n(largest_.data(), count_, std::numeric_limits<float>::lowest());
    std::fill_n(sum_.data(), count_, 0.0f);
    int64_t first = 0;  // that may win: the label of a pixel where every score is -inf
    while (rule != nullptr && first < names - 1 && rule->excluded[first]) ++first;
    std::fill_n(label_.data(), count_, static_cast<int32_t>(first));
  }

  Best row(int64_t y, bool sums) const {
    const int64_t at = y * stride_;
    return {value_.data() + at, label_.data() + at, largest_.data() + at, sums ? sum_.data() + at : nullptr};
  }

  void merge(const State& later, float scale) const {  // of names behind these
    at::parallel_for(0, count_, 1 << 14, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const float mine = value_.data()[i], theirs = later.value_.data()[i];
        if (theirs > mine || (std::isnan(theirs) && !std::isnan(mine))) {
          value_.data()[i] = theirs;
          label_.data()[i] = later.label_.data()[i];
        }
        const float before = largest_.data()[i], other = later.largest_.data()[i], largest = std::max(before, other);
        sum_.data()[i] = sum_.data()[i] * std::exp(scale * (before - largest)) +
                         later.sum_.data()[i] * std::exp(scale * (other - largest));
        largest_.data()[i] = largest;
      }
    });
  }

 private:
  int64_t stride_, count_;
  Buffer<float> value_, largest_, sum_;
  Buffer<int32_t> label_;
};

class TileRun {
 public:
  TileRun(const Request& request, const at::Tensor& image, const Range& rows, const Range& cols)
      : r_(request), kernel_(kernels()), core_rows_(rows), core_cols_(cols),
        rows_(rows.grown(r_.steps * r_.reach, r_.size[0])), cols_(cols.grown(r_.steps * r_.reach, r_.size[1])),
        tile_(tile_of(rows_, cols_, r_.reach)),
        weights_(r_.steps > 0 ? tile_.rows * r_.near.count * tile_.weight_cols : 0) {
    if (r_.steps == 0) return;
    const int64_t channels = image.size(0);
    Buffer<float> planes(plane_floats(channels));
    float* pixels = planes.data() + tile_.pad;
    fill(kernel_, tile_, Axis(image.size(-2), r_.size[0], rows_), Axis(image.size(-1), r_.size[1], cols_), image,
         pixels);
    at::parallel_for(0, tile_.rows, 4, [&](int64_t begin, int64_t end) {
      Buffer<float> scratch(r_.near.count * 16);
      for (int64_t y = begin; y < end; ++y)
        kernel_.weigh(tile_, r_.near, pixels, channels, y, weights_row(y), scratch.data());
    });
  }

  // refined: [Q, H, W] of one image, any floating dtype; or undefined, and the rule's labels and scores are written.
  void run(const at::Tensor& maps, const at::Tensor& refined, const Rule* rule) const {
    const int64_t names = maps.size(1), threads = at::get_num_threads();
    const int64_t share = (names + threads - 1) / threads;  // of a thread that takes names
    const int64_t fit = std::min(kNames, kPlaneBytes / (2 * tile_.plane * 4) / threads);
    const bool by_rows = threads == 1 || names < threads || fit < std::min(kFewNames, share);
    const int64_t parts = by_rows ? 1 : (names + share - 1) / share;
    const int64_t rounds = by_rows ? 1 : (share + fit - 1) / fit;
    const int64_t most = by_rows ? std::min(kNames, names) : (share + rounds - 1) / rounds;
    std::vector<std::unique_ptr<State>> states(parts);
    const auto take = [&](int64_t part) {
      states[part] = std::make_unique<State>(core_rows_, core_cols_, rule, names);
      const Range own = by_rows ? Range{0, names} : Range{part * share, std::min((part + 1) * share, names)};
      chunks(maps, own, most, refined, rule, *states[part]);
    };
    if (by_rows)
      take(0);
    else
      at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) take(part);
      });
    if (rule == nullptr) return;
    for (int64_t part = 1; part < parts; ++part) states[0]->merge(*states[part], static_cast<float>(rule->scale));
    write(*rule, *states[0]);
  }

 private:
  static Tile tile_of(const Range& rows, const Range& cols, int64_t reach) {
    const int64_t pad = round_up(reach, 16), weight_cols = round_up(cols.size(), kColumns);
    const int64_t stride = weight_cols + 2 * pad;
    return {rows.size(), cols.size(), pad, stride, rows.size() * stride, weight_cols};
  }

  int64_t plane_floats(int64_t planes) const { return planes * tile_.plane + kColumns + tile_.pad; }
  float* weights_row(int64_t y) const { return weights_.data() + y * r_.near.count * tile_.weight_cols; }

  // All steps of the names [first, end), `most` at once.
  void chunks(const at::Tensor& maps, const Range& own, int64_t most, const at::Tensor& refined, const Rule* rule,
              const State& state) const {
    const at::AutoDispatchBelowADInplaceOrView guard;  // a worker knows of no inference mode
    Buffer<float> ping(plane_floats(most)), pong(r_.steps > 0 ? plane_floats(most) : 0);
    const Range core_y = core_rows_.from(rows_), core_x = core_cols_.from(cols_);
    for (int64_t first = own.first; first < own.end; first += most) {
      const int64_t count = std::min(most, own.end - first);
      float *from = ping.data() + tile_.pad, *to = pong.data() + tile_.pad;
      {
        const auto chunk = chunk_of(r_, maps, first, count);
        fill(kernel_, tile_, Axis(chunk.size(-2), r_.size[0], rows_), Axis(chunk.size(-1), r_.size[1], cols_), chunk,
             from);
      }
      for (int64_t i = 1; i <= r_.steps; ++i) {
        const int64_t halo = (r_.steps - i) * r_.reach;
        const Range y = core_rows_.grown(halo, r_.size[0]).from(rows_);
        const Range x = core_cols_.grown(halo, r_.size[1]).from(cols_);
        at::parallel_for(y.first, y.end, 4, [&](int64_t begin, int64_t end) {
          for (int64_t row = begin; row < end; ++row)
            kernel_.step(tile_, r_.near, weights_row(row), from, to, count, row, x.first, x.end);
        });
        std::swap(from, to);
      }
      float* corner = from + core_y.first * tile_.stride + core_x.first;
      if (rule == nullptr) {
        refined.narrow(0, first, count)
            .narrow(1, core_rows_.first, core_rows_.size())
            .narrow(2, core_cols_.first, core_cols_.size())
            .copy_(at::from_blob(corner, {count, core_y.size(), core_x.size()}, {tile_.plane, tile_.stride, 1},
                                 at::TensorOptions().dtype(at::kFloat)));
        continue;
      }
      at::parallel_for(0, core_y.size(), 4, [&](int64_t begin, int64_t end) {
        for (int64_t y = begin; y < end; ++y)
          kernel_.fold(corner + y * tile_.stride, tile_.plane, count, first, rule->excluded,
                       static_cast<float>(rule->scale), core_x.size(), state.row(y, rule->scale > 0));
      });
    }
  }

  void write(const Rule& rule, const State& state) const {
    const auto scale = static_cast<float>(rule.scale);
    at::parallel_for(0, core_rows_.size(), 16, [&](int64_t begin, int64_t end) {
      for (int64_t y = begin; y < end; ++y) {
        const int64_t to = (core_rows_.first + y) * r_.size[1] + core_cols_.first;
        const Best best = state.row(y, true);
        for (int64_t x = 0; x < core_cols_.size(); ++x) {
          rule.labels[to + x] = best.label[x];
          rule.scores[to + x] =
              scale > 0 ? std::exp(scale * (best.value[x] - best.largest[x])) / best.sum[x] : best.value[x];
        }
      }
    });
  }

  const Request& r_;
  const Kernels& kernel_;
  Range core_rows_, core_cols_, rows_, cols_;  // of the image; the latter with the halo
  Tile tile_;
  Buffer<float> weights_;
};

void check(const at::Tensor& image, const at::Tensor& maps, at::IntArrayRef size, at::IntArrayRef crop,
           at::IntArrayRef canvas, at::IntArrayRef windows, int64_t steps, at::IntArrayRef dilations,
           at::IntArrayRef excluded) {
  constexpr char op[] = "refine_maps";
  check_floats(op, "image", image, at::kCPU, {kAny, kAny, kAny, kAny});
  check_floats(op, "maps", maps, at::kCPU, {kAny, kAny, kAny, kAny});
  check_size(op, "the size of image", image.sizes().slice(2));
  check_size(op, "the size of maps", maps.sizes().slice(2));
  check_size(op, "size", size);
  check_size(op, "crop_size", crop);
  check_size(op, "canvas_size", canvas);
  TORCH_CHECK_VALUE(image.size(1) >= 1 && image.size(1) <= kMaxSide && maps.size(1) <= kMaxSide, op,
                    ": image: expected a channel, got ", image.sizes(), " and maps ", maps.sizes());
  TORCH_CHECK_VALUE(!windows.empty() && windows.size() % 2 == 0, op, ": windows: expected pairs (y, x), got ", windows);
  TORCH_CHECK_VALUE(maps.size(0) == image.size(0) * (static_cast<int64_t>(windows.size()) / 2), op, ": maps: expected ",
                    windows.size() / 2, " windows an image, got ", maps.sizes(), " for ", image.sizes());
  for (size_t i = 0; i < windows.size(); ++i)
    TORCH_CHECK_VALUE(windows[i] >= 0 && windows[i] <= canvas[i % 2] - crop[i % 2], op, ": a window of size ", crop,
                      " leaves the canvas ", canvas);
  TORCH_CHECK_VALUE(!dilations.empty() && steps >= 0 && steps <= kMaxSide, op, ": steps: expected 0 to 2^24, got ", steps,
                    " and dilations ", dilations);
  for (const int64_t d : dilations)
    TORCH_CHECK_VALUE(d >= 1 && d <= kMaxSide && steps * d <= kMaxSide, op, ": dilations: expected at least 1, and ", steps,
                      " steps of them at most 2^24 pixels, got ", dilations);
  for (const int64_t name : excluded)
    TORCH_CHECK_VALUE(name >= 0 && name < maps.size(1), op, ": excluded: expected names 0..", maps.size(1) - 1, ", got ",
                      name);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& image_in, const at::Tensor& maps,
                                                       at::IntArrayRef size, at::IntArrayRef crop,
                                                       at::IntArrayRef canvas, at::IntArrayRef windows, int64_t steps,
                                                       at::IntArrayRef dilations, std::optional<double> logit_scale,
                                                       at::IntArrayRef excluded_names, bool labels_wanted) {
  check(image_in, maps, size, crop, canvas, windows, steps, dilations, excluded_names);
  const int64_t batch = image_in.size(0), names = maps.size(1), H = size[0], W = size[1];
  const int64_t per_image = static_cast<int64_t>(windows.size()) / 2;
  std::vector<int32_t> dy, dx;
  for (const int64_t d : dilations)
    for (int64_t y = -1; y <= 1; ++y)
      for (int64_t x = -1; x <= 1; ++x)
        if (y != 0 || x != 0) {
          dy.push_back(static_cast<int32_t>(y * d));
          dx.push_back(static_cast<int32_t>(x * d));
        }
  const int64_t reach = *std::max_element(dilations.begin(), dilations.end());
  const Request request{size,  crop,  canvas, windows,
                        steps, reach, Neighbours{static_cast<int64_t>(dy.size()), dy.data(), dx.data()}};

  const auto like = maps.options();
  auto refined = labels_wanted ? at::empty({0}, like) : at::empty({batch, names, H, W}, like);
  auto labels = at::empty({0}, like.dtype(at::kInt)), scores = at::empty({0}, like.dtype(at::kFloat));
  if (labels_wanted) {
    labels = at::empty({batch, H, W}, labels.options());
    scores = at::empty({batch, H, W}, scores.options());
  }
  Buffer<bool> excluded(names);
  std::fill_n(excluded.data(), names, false);
  for (const int64_t name : excluded_names) excluded.data()[name] = true;

  const int64_t channels = image_in.size(1);
  const int64_t pixel = 4 * (request.near.count + channels + 2 * std::min(kNames, names) + 4);
  const int64_t most = kTileBytes / pixel, side = static_cast<int64_t>(std::sqrt(static_cast<double>(most)));
  const int64_t tall = W <= side ? most / W : side, wide = H <= side ? most / H : side, halo = steps * reach;
  const bool whole = H * W <= most;
  for (int64_t b = 0; b < batch; ++b) {
    const auto image = image_in.select(0, b).to(at::kFloat).contiguous();
    const auto own = maps.narrow(0, b * per_image, per_image);
    const Rule rule{excluded.data(), logit_scale.value_or(0.0),
                    labels_wanted ? labels.data_ptr<int32_t>() + b * H * W : nullptr,
                    labels_wanted ? scores.data_ptr<float>() + b * H * W : nullptr};
    for (const Range& rows : cores(H, whole ? H : tall, halo))
      for (const Range& cols : cores(W, whole ? W : wide, halo))
        TileRun(request, image, rows, cols)
            .run(own, labels_wanted ? at::Tensor() : refined.select(0, b), labels_wanted ? &rule : nullptr);
  }
  return {refined, labels, scores};
}

}  // namespace
}  // namespace zs3fast::refine_maps

TORCH_LIBRARY_IMPL(zs3fast_cpp, CPU, m) { m.impl("refine_maps", zs3fast::refine_maps::forward); }
