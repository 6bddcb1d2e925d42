// mask_loss, CPU: focal and dice sums of bilinearly upsampled logits against a label map, without a full-size plane.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <tuple>
#include <vector>

#include "checks.h"
#include "isa.h"
#include "mask_loss/kernel.h"
#include "scratch.h"

namespace zs3fast::mask_loss {
namespace {

const Kernels& kernels() { return ZS3FAST_FOR_ISA(); }

int64_t round_up(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// Owns what an Axis points to. Pixel x lies at (2x + 1) in / (2 out) - 1/2 grid points: an exact fraction of 2 out.
class AxisTables {
 public:
  AxisTables(int64_t in, int64_t out)
      : begin_(in + 2, out), lower_(round_up(out) + kPad), upper_(lower_.size()), support_(in + 1) {
    int64_t next = 0;  // first band without a beginning yet
    for (int64_t x = 0; x < out; ++x) {
      const int64_t position = (2 * x + 1) * in + out;  // from one grid point before the first; 2 out a grid point
      const int64_t band = position / (2 * out), rest = position % (2 * out);
      while (next <= band) begin_[next++] = x;
      upper_[x] = static_cast<float>(rest / (2.0 * out));
      lower_[x] = static_cast<float>((2 * out - rest) / (2.0 * out));
    }
    for (int64_t j = 0; j < in; ++j) {
      for (int64_t x = begin_[j]; x < begin_[j + 2]; ++x) {
        const bool first = x < begin_[j + 1];  // the band before grid point j, or behind it
        const bool clamped = first ? j == 0 : j == in - 1;
        gather_.push_back(clamped ? 1.0f : first ? upper_[x] : lower_[x]);
      }
      gather_.resize(round_up(gather_.size()));
      support_[j + 1] = gather_.size();
    }
    axis = {in, out, round_up(out), begin_.data(), lower_.data(), upper_.data(), support_.data(), gather_.data()};
  }
  AxisTables(const AxisTables&) = delete;

  Axis axis;

 private:
  std::vector<int64_t> begin_;
  std::vector<float> lower_, upper_;
  std::vector<int64_t> support_;
  std::vector<float> gather_;
};

// Labels as int32 in rows of whole vectors, with -1 for all that is no class, and how often each class occurs in each
// band of rows.
class LabelTables {
 public:
  LabelTables(const at::Tensor& labels, const Axis& rows, int64_t padded, int64_t classes)
      : narrow(new int32_t[labels.size(0) * rows.out * padded]),
        counts(new int32_t[labels.size(0) * (rows.in + 1) * classes]()) {
    AT_DISPATCH_INTEGRAL_TYPES(labels.scalar_type(), "mask_loss", [&] {
      const auto* data = labels.const_data_ptr<scalar_t>();
      at::parallel_for(0, labels.size(0) * (rows.in + 1), 1, [&](int64_t first, int64_t last) {
        for (int64_t task = first; task < last; ++task) {
          const int64_t b = task / (rows.in + 1), band = task % (rows.in + 1);
          for (int64_t y = rows.begin[band]; y < rows.begin[band + 1]; ++y)
            narrow_row(data + b * labels.stride(0) + y * labels.stride(1), labels.size(2), labels.stride(2), classes,
                       padded, narrow.get() + (b * rows.out + y) * padded, counts.get() + task * classes);
        }
      });
    });
  }

  std::unique_ptr<int32_t[]> narrow, counts;

 private:
  template <class T>
  static void narrow_row(const T* labels, int64_t width, int64_t stride, int64_t classes, int64_t padded, int32_t* out,
                         int32_t* counts) {
    for (int64_t x = 0; x < width; ++x) {
      const int64_t label = labels[x * stride];
      out[x] = label >= 0 && label < classes ? static_cast<int32_t>(label) : -1;
    }
    std::fill(out + width, out + padded, -1);
    for (int64_t x = 0, end; x < width; x = end) {  // labels come in runs
      for (end = x + 1; end < width && out[end] == out[x];) ++end;
      if (out[x] >= 0) counts[out[x]] += static_cast<int32_t>(end - x);
    }
  }
};

constexpr char kOp[] = "mask_loss";

void check(const at::Tensor& mask_logits, const at::Tensor& labels) {
  check_floats(kOp, "mask_logits", mask_logits, at::kCPU, {kAny, kAny, kAny, kAny});
  check_tensor(kOp, "labels", labels, at::kCPU, {mask_logits.size(0), kAny, kAny});
  TORCH_CHECK_VALUE(mask_logits.size(1) <= kMaxPixels, kOp, ": too many classes, got ", mask_logits.sizes());
  check_size(kOp, "the grid of mask_logits", mask_logits.sizes().slice(2));
  check_size(kOp, "the size of labels", labels.sizes().slice(1));
}

// Everything a call shares between its planes.
struct Call {
  Call(const at::Tensor& mask_logits, const at::Tensor& labels, double alpha, double gamma)
      : logits(mask_logits.to(at::kFloat).contiguous()),  // [B, C, h, w] is small
        rows(logits.size(2), labels.size(1)),
        columns(logits.size(3), labels.size(2)),
        tables(labels, rows.axis, columns.axis.padded, logits.size(1)),
        planes(logits.size(0) * logits.size(1)),
        problem{rows.axis, columns.axis, logits.size(1), static_cast<float>(alpha), static_cast<float>(gamma),
                logits.const_data_ptr<float>(), tables.narrow.get(), tables.counts.get()} {}

  template <class Plane>
  void for_each_plane(Plane plane) const {
    at::parallel_for(0, planes, 1, [&](int64_t first, int64_t last) {
      ScratchArena scratch = ScratchArena::of_floats(scratch_floats(problem));
      for (int64_t p = first; p < last; ++p) plane(p, scratch.floats());
    });
  }

  at::Tensor logits;
  AxisTables rows, columns;
  LabelTables tables;
  int64_t planes;
  Problem problem;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& mask_logits,
                                                                   const at::Tensor& labels, double alpha,
                                                                   double gamma) {
  check(mask_logits, labels);
  const Call call(mask_logits, labels, alpha, gamma);
  const int64_t classes = call.problem.classes, bands = call.problem.rows.in + 1;
  const auto empty = [&] { return at::empty({mask_logits.size(0), classes}, call.logits.options()); };
  auto focal_sum = empty(), intersection = empty(), prob_sum = empty(), target_count = empty();
  float *focal = focal_sum.data_ptr<float>(), *overlap = intersection.data_ptr<float>(),
        *prob = prob_sum.data_ptr<float>(), *count = target_count.data_ptr<float>();
  const Kernels& kernel = kernels();
  call.for_each_plane([&](int64_t plane, float* scratch) {
    const Sums sums = kernel.forward(call.problem, plane, scratch);
    focal[plane] = static_cast<float>(sums.focal);
    overlap[plane] = static_cast<float>(sums.intersection);
    prob[plane] = static_cast<float>(sums.prob);
    int64_t pixels = 0;
    for (int64_t band = 0; band < bands; ++band)
      pixels += call.problem.counts[(plane / classes * bands + band) * classes + plane % classes];
    count[plane] = static_cast<float>(pixels);
  });
  return {focal_sum, intersection, prob_sum, target_count};
}

at::Tensor backward(const at::Tensor& grad_focal_sum, const at::Tensor& grad_intersection,
                    const at::Tensor& grad_prob_sum, const at::Tensor& mask_logits, const at::Tensor& labels,
                    double alpha, double gamma) {
  check(mask_logits, labels);
  for (const auto* grad : {&grad_focal_sum, &grad_intersection, &grad_prob_sum})
    check_floats(kOp, "a gradient", *grad, at::kCPU, {mask_logits.size(0), mask_logits.size(1)});
  const Call call(mask_logits, labels, alpha, gamma);
  const auto focal = grad_focal_sum.to(at::kFloat).contiguous(), prob = grad_prob_sum.to(at::kFloat).contiguous(),
             overlap = grad_intersection.to(at::kFloat).contiguous();
  const float *of_focal = focal.const_data_ptr<float>(), *of_overlap = overlap.const_data_ptr<float>(),
              *of_prob = prob.const_data_ptr<float>();
  auto grad = at::empty(call.logits.sizes(), call.logits.options());
  float* out = grad.data_ptr<float>();
  const int64_t cells = call.problem.rows.in * call.problem.columns.in;
  const Kernels& kernel = kernels();
  call.for_each_plane([&](int64_t plane, float* scratch) {
    kernel.backward(call.problem, plane, of_focal[plane], of_overlap[plane], of_prob[plane], out + plane * cells,
                    scratch);
  });
  return grad.to(mask_logits.scalar_type());
}

}  // namespace
}  // namespace zs3fast::mask_loss

TORCH_LIBRARY_IMPL(zs3fast_cpp, CPU, m) {
  m.impl("mask_loss", zs3fast::mask_loss::forward);
  m.impl("mask_loss_backward", zs3fast::mask_loss::backward);
}
