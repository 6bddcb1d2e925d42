// mask_loss, CUDA: outputs, workspace and two launches a direction (cuda_kernel.h).
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "cuda/launch.h"
#include "mask_loss/cuda.h"

namespace zs3fast::mask_loss {
namespace {

Label label_of(const at::Tensor& labels) {
  switch (labels.scalar_type()) {
    case at::kByte: return Label::uint8;
    case at::kChar: return Label::int8;
    case at::kShort: return Label::int16;
    case at::kInt: return Label::int32;
    case at::kLong: return Label::int64;
    default: TORCH_CHECK(false, "mask_loss: labels must be integers, got ", labels.scalar_type());
  }
}

CudaProblem problem_of(const at::Tensor& mask_logits, const at::Tensor& labels, double alpha, double gamma) {
  const auto sizes = mask_logits.sizes();
  const bool fits = cuda::fits(sizes[2], labels.size(1)) && cuda::fits(sizes[3], labels.size(2)) && sizes[0] < 16384 &&
                    sizes[1] < (1 << 20) && sizes[2] * sizes[3] <= INT32_MAX;
  TORCH_CHECK(fits, "mask_loss: too large for one launch: mask_logits ", sizes, ", labels ", labels.sizes());
  CudaProblem q{};
  q.logits = mask_logits.const_data_ptr(), q.labels = labels.const_data_ptr();
  q.element = cuda::element_of(mask_logits), q.label = label_of(labels);
  q.logits_b = mask_logits.stride(0), q.logits_c = mask_logits.stride(1);
  q.logits_y = mask_logits.stride(2), q.logits_x = mask_logits.stride(3);
  q.labels_b = labels.stride(0), q.labels_y = labels.stride(1), q.labels_x = labels.stride(2);
  q.images = static_cast<int32_t>(sizes[0]), q.classes = static_cast<int32_t>(sizes[1]);
  q.rows = {static_cast<int32_t>(sizes[2]), static_cast<int32_t>(labels.size(1))};
  q.columns = {static_cast<int32_t>(sizes[3]), static_cast<int32_t>(labels.size(2))};
  q.alpha = static_cast<float>(alpha), q.gamma = static_cast<float>(gamma);
  gpu::plan(q);
  TORCH_CHECK(q.tile_rows() < 65536, "mask_loss: too many rows for one launch: labels ", labels.sizes());
  return q;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& mask_logits,
                                                                   const at::Tensor& labels, double alpha,
                                                                   double gamma) {
  const cuda::Device device(mask_logits);
  const auto options = mask_logits.options().dtype(at::kFloat);
  const int64_t images = mask_logits.size(0), classes = mask_logits.size(1);
  const auto sums = at::empty({4, images, classes}, options);
  if (images > 0) {
    const CudaProblem q = problem_of(mask_logits, labels, alpha, gamma);
    const auto partial = at::empty({4, images, static_cast<int64_t>(q.tile_rows()) * q.strips, classes}, options);
    ZS3FAST_LAUNCH(forward(q, partial.data_ptr<float>(), sums.data_ptr<float>(), device.stream()));
  }
  return {sums.select(0, 0), sums.select(0, 1), sums.select(0, 2), sums.select(0, 3)};
}

at::Tensor backward(const at::Tensor& grad_focal_sum, const at::Tensor& grad_intersection,
                    const at::Tensor& grad_prob_sum, const at::Tensor& mask_logits, const at::Tensor& labels,
                    double alpha, double gamma) {
  const cuda::Device device(mask_logits);
  auto out = at::empty(mask_logits.sizes(), mask_logits.options());
  if (mask_logits.size(0) == 0) return out;
  const auto focal = grad_focal_sum.contiguous(), overlap = grad_intersection.contiguous(),
             prob = grad_prob_sum.contiguous();
  const CudaProblem q = problem_of(mask_logits, labels, alpha, gamma);
  const int64_t tiles = static_cast<int64_t>(q.tile_rows()) * q.tile_columns();
  const auto corners = at::empty({4, mask_logits.size(0), tiles, mask_logits.size(1)}, focal.options());
  const Gradients grad{focal.const_data_ptr<float>(), overlap.const_data_ptr<float>(), prob.const_data_ptr<float>()};
  ZS3FAST_LAUNCH(backward(q, grad, corners.data_ptr<float>(), out.mutable_data_ptr(), device.stream()));
  return out;
}

}  // namespace
}  // namespace zs3fast::mask_loss

TORCH_LIBRARY_IMPL(zs3fast_cpp, CUDA, m) {
  m.impl("mask_loss", zs3fast::mask_loss::forward);
  m.impl("mask_loss_backward", zs3fast::mask_loss::backward);
}
