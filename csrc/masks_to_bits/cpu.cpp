// masks_to_bits, CPU: tables of both resizes, once a call, and a task a mask (kernel.h).
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "checks.h"
#include "isa.h"
#include "masks_to_bits/kernel.h"

namespace zs3fast::masks_to_bits {
namespace {

const Kernels& kernels() { return ZS3FAST_FOR_ISA(); }

// torch's own fp32 coordinates, rounding included (one fused multiply-add): the mask of a box changes by whole pixels
// from one patch to the next, so a coordinate that is off by 1e-5 is a mean that is off by as much.
class AxisTable {
 public:
  AxisTable(int64_t in, int64_t out, bool align_corners) {
    const float scale = !align_corners ? static_cast<float>(in) / static_cast<float>(out)
                        : out > 1      ? static_cast<float>(in - 1) / static_cast<float>(out - 1)
                                       : 0.0f;
    for (int64_t i = 0; i < out; ++i) {
      const float place = static_cast<float>(i);
      const float source = in == out       ? place
                           : align_corners ? scale * place
                                           : std::max(0.0f, std::fma(scale, place + 0.5f, -0.5f));
      const int64_t low = std::min(static_cast<int64_t>(source), in - 1);
      // at the same size a pixel is read alone: a NaN beside it is not its business
      add(low, in == out ? low : std::min(low + 1, in - 1), std::clamp(source - static_cast<float>(low), 0.0f, 1.0f));
    }
  }

  // The entries of `all` at `places`.
  AxisTable(const AxisTable& all, const std::vector<int32_t>& places) {
    for (const int32_t i : places) add(all.low_[i], all.high_[i], all.weight_[i]);
  }

  Axis view() const { return {low_.data(), high_.data(), weight_.data()}; }

  std::vector<int32_t> low_then_high() const {
    std::vector<int32_t> both(low_);
    both.insert(both.end(), high_.begin(), high_.end());
    return both;
  }

 private:
  void add(int64_t low, int64_t high, float weight) {
    low_.push_back(static_cast<int32_t>(low));
    high_.push_back(static_cast<int32_t>(high));
    weight_.push_back(weight);
  }

  std::vector<int32_t> low_, high_;
  std::vector<float> weight_;
};

at::Tensor masks_to_bits(const at::Tensor& masks_in, at::IntArrayRef grid, at::IntArrayRef padded, bool align_corners,
                         bool logits) {
  constexpr char op[] = "masks_to_bits";
  check_floats(op, "masks", masks_in, at::kCPU, {kAny, kAny, kAny, kAny});
  check_size(op, "the size of masks", masks_in.sizes().slice(2));
  check_size(op, "grid", grid);
  check_size(op, "padded_size", padded);
  TORCH_CHECK_VALUE(logits || padded == masks_in.sizes().slice(2), op, ": soft masks are on the padded frame ", padded,
                    ", got ", masks_in.sizes());
  const auto masks = masks_in.to(at::kFloat);
  const int64_t words = (grid[0] * grid[1] + 31) / 32;
  auto bits = at::empty({masks.size(0), masks.size(1), words}, masks.options().dtype(at::kInt));
  if (bits.numel() == 0) return bits;

  const AxisTable grid_y(padded[0], grid[0], false), grid_x(padded[1], grid[1], false);
  const std::vector<int32_t> tap = grid_x.low_then_high();
  const AxisTable padded_y(masks.size(2), padded[0], align_corners);
  const AxisTable padded_x(AxisTable(masks.size(3), padded[1], align_corners), tap);
  const Request request{masks.const_data_ptr<float>(),
                        masks.size(1),
                        masks.stride(0),
                        masks.stride(1),
                        masks.stride(2),
                        masks.stride(3),
                        masks.size(3),
                        grid[0],
                        grid[1],
                        words,
                        logits,
                        grid_y.view(),
                        grid_x.view(),
                        tap.data(),
                        padded_y.view(),
                        padded_x.view(),
                        reinterpret_cast<uint32_t*>(bits.mutable_data_ptr<int32_t>())};
  const auto run = kernels().run;
  at::parallel_for(0, masks.size(0) * masks.size(1), 1, [&](int64_t begin, int64_t end) {
    const auto scratch = std::make_unique_for_overwrite<float[]>(request.width + 4 * request.grid_w);
    for (int64_t mask = begin; mask < end; ++mask) run(request, mask, scratch.get());
  });
  return bits;
}

}  // namespace

TORCH_LIBRARY_IMPL(zs3fast_cpp, CPU, m) { m.impl("masks_to_bits", masks_to_bits); }

}  // namespace zs3fast::masks_to_bits
