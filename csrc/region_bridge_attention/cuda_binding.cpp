// region_bridge_attention, CUDA: the forward pass in one launch (cuda_kernel.h).
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "cuda/launch.h"
#include "cuda/mma_binding.h"
#include "region_bridge_attention/cuda.h"

namespace zs3fast::region_bridge_attention {
namespace {

constexpr char kOp[] = "region_bridge_attention";

std::tuple<at::Tensor, at::Tensor> attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                          int64_t num_prefix, at::IntArrayRef grid, at::IntArrayRef regions,
                                          double scale) {
  const cuda::Device device(q);
  auto output = mma::empty_heads(q);
  auto lse = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
  mma::int_of(kOp, k.size(2));  // of which all other counts of tokens are parts
  mma::with_half_type(kOp, q, [&](auto type) {
    using T = decltype(type);
    const Problem<T> problem{mma::int_of(kOp, q.size(0)),
                             mma::int_of(kOp, q.size(1)),
                             static_cast<int>(q.size(2) - grid[0] * grid[1] - regions[0] * regions[1]),
                             static_cast<int>(num_prefix),
                             static_cast<int>(grid[0]),
                             static_cast<int>(grid[1]),
                             static_cast<int>(regions[0]),
                             static_cast<int>(regions[1]),
                             static_cast<float>(scale),
                             mma::heads_of<T>(kOp, "q", q),
                             mma::heads_of<T>(kOp, "k", k),
                             mma::heads_of<T>(kOp, "v", v),
                             mma::output_heads_of<T>(output),
                             lse.mutable_data_ptr<float>()};
    if (mma::int_of(kOp, problem.blocks()) == 0) return;
    ZS3FAST_LAUNCH(forward(problem, mma::int_of(kOp, q.size(3)), device.stream()));
  });
  return {output, lse};
}

}  // namespace
}  // namespace zs3fast::region_bridge_attention

TORCH_LIBRARY_IMPL(zs3fast_cpp, CUDA, m) {
  m.impl("region_bridge_attention", zs3fast::region_bridge_attention::attend);
}
