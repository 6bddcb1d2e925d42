// masks_to_labels, CUDA: one window at its native size and the best class; zs3fast/ops/masks_to_labels.py refuses the
// rest.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "cuda/launch.h"
#include "masks_to_labels/cuda.h"

namespace zs3fast::masks_to_labels {
namespace {

CudaMaps maps_of(const at::Tensor& x, at::IntArrayRef size) {
  TORCH_CHECK(cuda::fits(x.size(2), size[0]) && cuda::fits(x.size(3), size[1]),
              "masks_to_labels: too large for one launch: maps ", x.sizes(), ", size ", size);
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3),
          {static_cast<int32_t>(x.size(2)), static_cast<int32_t>(size[0])},
          {static_cast<int32_t>(x.size(3)), static_cast<int32_t>(size[1])}};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> masks_to_labels(
    const at::Tensor& mask_logits, const std::optional<at::Tensor>& trusty_logits, at::IntArrayRef seen,
    double seen_offset, c10::string_view trusty_weighting, at::IntArrayRef size, at::IntArrayRef crop_size,
    at::IntArrayRef canvas_size, at::IntArrayRef windows, int64_t top_k, at::ScalarType dtype, bool return_details) {
  const cuda::Device device(mask_logits);
  const int64_t images = mask_logits.size(0), classes = mask_logits.size(1);
  TORCH_CHECK(windows.size() == 2 && size == crop_size && size == canvas_size && top_k == 1,
              "masks_to_labels: the CUDA kernel takes one window of the size of the labels, and top_k = 1");
  TORCH_CHECK(classes <= kMaxClasses && images < 65536, "masks_to_labels: the CUDA kernel takes ", kMaxClasses,
              " classes and 65535 images, got mask_logits ", mask_logits.sizes());
  const auto options = mask_logits.options();
  const at::Tensor labels = at::empty({images, size[0], size[1]}, options.dtype(dtype));
  const at::Tensor scores = return_details ? at::empty(labels.sizes(), options.dtype(at::kFloat))
                                           : at::empty({0}, options.dtype(at::kFloat));
  const at::Tensor nan_count = at::zeros({return_details ? images : 0}, options.dtype(at::kLong));
  if (labels.numel() == 0) return {labels, scores, nan_count};

  CudaRequest q{};
  q.masks = maps_of(mask_logits, size);
  if (trusty_logits) q.trusty = maps_of(*trusty_logits, size);
  q.element = cuda::element_of(mask_logits);
  q.images = static_cast<int32_t>(images), q.classes = static_cast<int32_t>(classes);
  q.height = static_cast<int32_t>(size[0]), q.width = static_cast<int32_t>(size[1]);
  q.seen_offset = static_cast<float>(seen_offset);
  q.weigh_seen = trusty_logits && (trusty_weighting == "both" || trusty_weighting == "seen");
  q.weigh_unseen = trusty_logits && (trusty_weighting == "both" || trusty_weighting == "unseen");
  q.labels = labels.mutable_data_ptr();
  q.label_bytes = static_cast<int32_t>(labels.element_size());
  q.scores = return_details ? scores.mutable_data_ptr<float>() : nullptr;
  q.nan_count = return_details ? nan_count.mutable_data_ptr<int64_t>() : nullptr;
  for (const int64_t c : seen) q.seen[c / 32] |= 1u << (c % 32);
  gpu::plan(q);
  TORCH_CHECK((q.masks.rows.points + 1) * static_cast<int64_t>(q.chunks) < 65536,
              "masks_to_labels: too many rows for one launch: ", size);
  ZS3FAST_LAUNCH(one_window(q, device.stream()));
  return {labels, scores, nan_count};
}

}  // namespace

TORCH_LIBRARY_IMPL(zs3fast_cpp, CUDA, m) { m.impl("masks_to_labels", &masks_to_labels); }

}  // namespace zs3fast::masks_to_labels
