// Binds masks_to_labels to torch: outputs, the tables of every resize, and the choice of kernel and instruction set.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "isa.h"
#include "masks_to_labels/request.h"
#include "scratch.h"

namespace zs3fast::masks_to_labels {
namespace {

using Run = void (*)(const Request&, int64_t, int64_t, unsigned char*);

// Bilinear, align_corners=False, in integers: source = ((2 i + 1) in - out) / (2 out), at least 0. torch's own floats are off
// by 1e-6 on a large map. At the same size a coordinate is the mean of itself with itself, exact for infinities too.
class AxisTable {
 public:
  AxisTable(int64_t in, int64_t out) : low_(out), high_(out), weight_(out) {
    for (int64_t i = 0; i < out; ++i) {
      const int64_t source = std::max<int64_t>(0, (2 * i + 1) * in - out);
      low_[i] = static_cast<int32_t>(source / (2 * out));
      high_[i] = in == out ? low_[i] : static_cast<int32_t>(std::min<int64_t>(low_[i] + 1, in - 1));
      weight_[i] = in == out ? 0.5f : static_cast<float>(static_cast<double>(source % (2 * out)) / (2.0 * out));
    }
  }
  Axis view() const { return {low_.data(), high_.data(), weight_.data()}; }

 private:
  std::vector<int32_t> low_, high_;
  std::vector<float> weight_;
};

Maps maps_of(const at::Tensor& x) {
  const Element element = x.scalar_type() == at::kFloat  ? Element::float32
                          : x.scalar_type() == at::kHalf ? Element::float16
                                                         : Element::bfloat16;
  return {x.const_data_ptr(), element, x.size(2), x.size(3), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

// The kernel for a request on the instruction set at hand.
std::pair<Plan, Run> kernel_for(const Request& request) {
  const bool one = request.one_native_window() && request.top_k == 1 && request.masks.h != request.height &&
                   request.masks.w != request.width &&
                   (!request.weighted() || (request.trusty.h == request.masks.h && request.trusty.w == request.masks.w));
  if (one) return {ZS3FAST_FOR_ISA(::plan_one_window)(request), ZS3FAST_FOR_ISA(::run_one_window)};
  return {ZS3FAST_FOR_ISA(::plan_windows)(request), ZS3FAST_FOR_ISA(::run_windows)};
}

void check(const at::Tensor& mask_logits, const std::optional<at::Tensor>& trusty_logits, at::IntArrayRef seen,
           c10::string_view trusty_weighting, at::IntArrayRef size, at::IntArrayRef crop, at::IntArrayRef canvas,
           at::IntArrayRef windows, int64_t top_k, at::ScalarType dtype) {
  constexpr char op[] = "masks_to_labels";
  check_floats(op, "mask_logits", mask_logits, at::kCPU, {kAny, kAny, kAny, kAny});
  check_size(op, "the grid of mask_logits", mask_logits.sizes().slice(2));
  if (trusty_logits) {
    check_floats(op, "trusty_logits", *trusty_logits, at::kCPU, {mask_logits.size(0), 1, kAny, kAny});
    check_size(op, "the grid of trusty_logits", trusty_logits->sizes().slice(2));
  }
  const int64_t classes = mask_logits.size(1);
  check_labels(op, dtype, classes);
  TORCH_CHECK_VALUE(top_k >= 1 && top_k <= classes, op, ": top_k: expected in 1..C = ", classes, ", got ", top_k);
  for (const int64_t c : seen)
    TORCH_CHECK_VALUE(c >= 0 && c < classes, op, ": seen: expected class indices 0..", classes - 1, ", got ", c);
  TORCH_CHECK_VALUE(trusty_weighting == "both" || trusty_weighting == "seen" || trusty_weighting == "unseen" ||
                        trusty_weighting == "off",
                    op, ": trusty_weighting: expected both, seen, unseen or off, got ", trusty_weighting);
  check_size(op, "size", size);
  check_size(op, "crop_size", crop);
  check_size(op, "canvas_size", canvas);
  TORCH_CHECK_VALUE(!windows.empty() && windows.size() % 2 == 0, op, ": windows: expected pairs (y, x), got ", windows);
  const int64_t count = static_cast<int64_t>(windows.size()) / 2;
  TORCH_CHECK_VALUE(mask_logits.size(0) % count == 0, op, ": ", mask_logits.size(0), " rows of mask_logits for ", count,
                    " windows");
  for (size_t i = 0; i < windows.size(); ++i)
    TORCH_CHECK_VALUE(windows[i] >= 0 && windows[i] <= canvas[i % 2] - crop[i % 2], op, ": window (", windows[i / 2 * 2],
                      ", ", windows[i / 2 * 2 + 1], ") of size ", crop, " leaves the canvas ", canvas);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> masks_to_labels(
    const at::Tensor& mask_logits, const std::optional<at::Tensor>& trusty_logits, at::IntArrayRef seen, double seen_offset,
    c10::string_view trusty_weighting, at::IntArrayRef size, at::IntArrayRef crop_size, at::IntArrayRef canvas_size,
    at::IntArrayRef windows, int64_t top_k, at::ScalarType dtype, bool return_details) {
  check(mask_logits, trusty_logits, seen, trusty_weighting, size, crop_size, canvas_size, windows, top_k, dtype);
  const int64_t classes = mask_logits.size(1), num_windows = static_cast<int64_t>(windows.size()) / 2;
  const int64_t batch = mask_logits.size(0) / num_windows;
  std::vector<int64_t> shape{batch, size[0], size[1]};
  if (top_k > 1) shape.insert(shape.begin() + 1, top_k);
  const auto options = mask_logits.options();
  const at::Tensor labels = at::empty(shape, options.dtype(dtype));
  const at::Tensor scores =
      at::empty(return_details ? at::IntArrayRef(shape) : at::IntArrayRef{0}, options.dtype(at::kFloat));
  const at::Tensor nan_count = at::zeros({return_details ? batch : 0}, options.dtype(at::kLong));
  if (labels.numel() == 0) return {labels, scores, nan_count};

  std::vector<uint8_t> is_seen(classes, 0);
  for (const int64_t c : seen) is_seen[c] = 1;
  const AxisTable masks_y(mask_logits.size(2), crop_size[0]), masks_x(mask_logits.size(3), crop_size[1]);
  const AxisTable resize_y(canvas_size[0], size[0]), resize_x(canvas_size[1], size[1]);
  const AxisTable trusty_y(trusty_logits ? trusty_logits->size(2) : 1, crop_size[0]);
  const AxisTable trusty_x(trusty_logits ? trusty_logits->size(3) : 1, crop_size[1]);

  Request request{};
  request.masks = maps_of(mask_logits);
  if (trusty_logits) request.trusty = maps_of(*trusty_logits);
  request.batch = batch, request.classes = classes;
  request.seen = is_seen.data();
  request.seen_offset = static_cast<float>(seen_offset);
  request.weigh_seen = trusty_logits && (trusty_weighting == "both" || trusty_weighting == "seen");
  request.weigh_unseen = trusty_logits && (trusty_weighting == "both" || trusty_weighting == "unseen");
  request.crop_h = crop_size[0], request.crop_w = crop_size[1];
  request.canvas_h = canvas_size[0], request.canvas_w = canvas_size[1];
  request.height = size[0], request.width = size[1];
  request.windows = windows.data(), request.num_windows = num_windows;
  request.top_k = top_k;
  request.masks_y = masks_y.view(), request.masks_x = masks_x.view();
  request.trusty_y = trusty_y.view(), request.trusty_x = trusty_x.view();
  request.resize_y = resize_y.view(), request.resize_x = resize_x.view();
  request.labels = labels.mutable_data_ptr();
  request.label_bytes = static_cast<int>(labels.element_size());
  request.scores = return_details ? scores.mutable_data_ptr<float>() : nullptr;
  request.nan_count = return_details ? nan_count.mutable_data_ptr<int64_t>() : nullptr;

  const auto [plan, run] = kernel_for(request);
  const int64_t scratch_bytes = plan.scratch_bytes;
  at::parallel_for(0, plan.tasks, 1, [&, run = run](int64_t first, int64_t last) {
    ScratchArena scratch(scratch_bytes);
    run(request, first, last, scratch.bytes());
  });
  return {labels, scores, nan_count};
}

}  // namespace

TORCH_LIBRARY_IMPL(zs3fast_cpp, CPU, m) { m.impl("masks_to_labels", &masks_to_labels); }

}  // namespace zs3fast::masks_to_labels
