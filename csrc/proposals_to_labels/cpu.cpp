// Binds proposals_to_labels to torch: outputs, what every tile reads, and the choice of instruction set.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <tuple>
#include <vector>

#include "checks.h"
#include "isa.h"
#include "proposals_to_labels/request.h"
#include "scratch.h"

namespace zs3fast::proposals_to_labels {
namespace {

const Kernels& kernels() { return ZS3FAST_FOR_ISA(); }

// Bilinear resize of one axis in integers, since torch's own floats are off by 1e-6 on a large map. At the same size a
// coordinate is the mean of itself with itself, exact for infinities too.
struct Resize {
  int64_t in, out;
  bool align_corners;

  void at(int64_t i, int64_t& low, int64_t& high, float& weight) const {
    if (in == out) {
      low = high = i;
      weight = 0.5f;
      return;
    }
    const int64_t scale = align_corners ? std::max<int64_t>(out - 1, 1) : 2 * out;
    const int64_t source = align_corners ? (out > 1 ? i * (in - 1) : 0) : std::max<int64_t>(0, (2 * i + 1) * in - out);
    low = source / scale;
    high = std::min(low + 1, in - 1);
    weight = static_cast<float>(static_cast<double>(source % scale) / static_cast<double>(scale));
  }
};

// Index of a coordinate in an ascending list, added behind if it is not there yet; only the last two can be.
int32_t find_or_add(int32_t* list, int32_t& count, int64_t coordinate) {
  for (int32_t i = count - 1; i >= 0 && i >= count - 2; --i)
    if (list[i] == coordinate) return i;
  list[count] = static_cast<int32_t>(coordinate);
  return count++;
}

// frame: image pixel -> patch.  resize: output -> image pixel.
std::vector<AxisTile> tiles_of(const Resize& frame, const Resize& resize) {
  std::vector<AxisTile> tiles((resize.out + kTile - 1) / kTile);
  for (size_t t = 0; t < tiles.size(); ++t) {
    AxisTile& tile = tiles[t];
    const int64_t first = static_cast<int64_t>(t) * kTile;
    tile.outputs = static_cast<int32_t>(std::min(kTile, resize.out - first));
    tile.pixels = tile.patches = 0;
    int32_t pixels[2 * kTile];
    int64_t low, high;
    for (int64_t i = 0; i < kTile; ++i) {
      resize.at(std::min(first + i, resize.out - 1), low, high, tile.pixel_weight[i]);
      tile.pixel_low[i] = find_or_add(pixels, tile.pixels, low);
      tile.pixel_high[i] = find_or_add(pixels, tile.pixels, high);
    }
    for (int64_t i = 0; i < 3 * kTile; ++i) {
      frame.at(pixels[std::min<int64_t>(i, tile.pixels - 1)], low, high, tile.patch_weight[i]);
      tile.patch_low[i] = find_or_add(tile.patch, tile.patches, low);
      tile.patch_high[i] = find_or_add(tile.patch, tile.patches, high);
    }
  }
  return tiles;
}

int64_t most_patches(const std::vector<AxisTile>& tiles) {
  int64_t most = 0;
  for (const AxisTile& tile : tiles) most = std::max<int64_t>(most, tile.patches);
  return most;
}

// What pruning knows of the weights of every proposal.
struct Weights {
  std::vector<float> spread, largest;
  std::vector<uint8_t> finite;

  explicit Weights(const at::Tensor& weights) : finite(weights.size(0), 1) {
    const int64_t rows = weights.size(0) * weights.size(1), classes = weights.size(2);
    const float* from = weights.const_data_ptr<float>();
    spread.resize(rows), largest.resize(rows);
    for (int64_t row = 0; row < rows; ++row, from += classes) {
      const auto [least, greatest] = std::minmax_element(from, from + classes);
      spread[row] = *greatest - *least;
      largest[row] = std::max(std::abs(*least), std::abs(*greatest));
      if (!std::all_of(from, from + classes, [](float x) { return std::isfinite(x); })) finite[row / weights.size(1)] = 0;
    }
  }
};

std::tuple<at::Tensor, at::Tensor> proposals_to_labels(
    const at::Tensor& class_weights, const at::Tensor& masks, at::IntArrayRef size, bool logits, at::IntArrayRef padded_size,
    at::IntArrayRef image_size, bool align_corners, at::ScalarType dtype, bool return_scores) {
  constexpr char op[] = "proposals_to_labels";
  check_floats(op, "masks", masks, at::kCPU, {kAny, kAny, kAny, kAny});
  check_floats(op, "class_weights", class_weights, at::kCPU, {masks.size(0), masks.size(1), kAny});
  check_labels(op, dtype, class_weights.size(2));
  check_size(op, "the size of masks", masks.sizes().slice(2));
  check_size(op, "size", size);
  check_size(op, "padded_size", padded_size);
  check_size(op, "image_size", image_size);
  TORCH_CHECK_VALUE(logits || padded_size == masks.sizes().slice(2), op, ": soft masks are on the padded frame ",
                    padded_size, ", got ", masks.sizes());
  TORCH_CHECK_VALUE(image_size[0] <= padded_size[0] && image_size[1] <= padded_size[1], op, ": image_size ", image_size,
                    " does not fit in the padded frame ", padded_size);
  const at::Tensor labels = at::empty({masks.size(0), size[0], size[1]}, masks.options().dtype(dtype));
  const at::Tensor scores =
      at::empty(return_scores ? labels.sizes() : at::IntArrayRef{0}, masks.options().dtype(at::kFloat));
  if (labels.numel() == 0) return {labels, scores};

  const at::Tensor weights = class_weights.to(at::kFloat).contiguous();
  const Weights known(weights);
  const int64_t h = masks.size(2), w = masks.size(3);
  const bool upsample = h != padded_size[0] || w != padded_size[1];
  const Resize frame_y{h, padded_size[0], align_corners}, frame_x{w, padded_size[1], align_corners};
  const std::vector<AxisTile> tiles_y = tiles_of(frame_y, {image_size[0], size[0], false});
  const std::vector<AxisTile> tiles_x = tiles_of(frame_x, {image_size[1], size[1], false});
  const Element element = masks.scalar_type() == at::kFloat  ? Element::float32
                          : masks.scalar_type() == at::kHalf ? Element::float16
                                                             : Element::bfloat16;
  const Request request{
      .weights = weights.const_data_ptr<float>(),
      .spread = known.spread.data(),
      .largest = known.largest.data(),
      .finite = known.finite.data(),
      .maps = {masks.const_data_ptr(), element, w, masks.stride(0), masks.stride(1), masks.stride(2), masks.stride(3)},
      .logits = logits,
      .upsample = upsample,
      .batch = masks.size(0),
      .proposals = masks.size(1),
      .classes = weights.size(2),
      .height = size[0],
      .width = size[1],
      .tiles_y = tiles_y.data(),
      .tiles_x = tiles_x.data(),
      .patches_y = most_patches(tiles_y),
      .patches_x = most_patches(tiles_x),
      .labels = labels.mutable_data_ptr(),
      .label_bytes = static_cast<int>(labels.element_size()),
      .scores = return_scores ? scores.mutable_data_ptr<float>() : nullptr,
  };
  const int64_t tasks = request.batch * static_cast<int64_t>(tiles_y.size() * tiles_x.size());
  const int64_t bytes = kernels().scratch_bytes(request);
  std::atomic<int64_t> next{0};  // tiles differ in work a hundredfold: threads take the next one, not a share
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    ScratchArena scratch(bytes);
    for (int64_t task = next++; task < tasks; task = next++) kernels().run(request, task, scratch.bytes());
  });
  return {labels, scores};
}

}  // namespace

TORCH_LIBRARY_IMPL(zs3fast_cpp, CPU, m) { m.impl("proposals_to_labels", &proposals_to_labels); }

}  // namespace zs3fast::proposals_to_labels
