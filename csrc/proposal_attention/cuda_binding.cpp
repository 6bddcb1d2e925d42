// proposal_attention, CUDA: the forward pass in one launch (cuda_kernel.h).
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "cuda/launch.h"
#include "cuda/mma_binding.h"
#include "proposal_attention/cuda.h"

namespace zs3fast::proposal_attention {
namespace {

constexpr char kOp[] = "proposal_attention";

std::tuple<at::Tensor, at::Tensor> attend(const at::Tensor& q, const at::Tensor& k_self, const at::Tensor& v_self,
                                          const at::Tensor& k, const at::Tensor& v, const at::Tensor& bits,
                                          double scale) {
  const cuda::Device device(q);
  auto output = mma::empty_heads(q);
  auto lse = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
  mma::with_half_type(kOp, q, [&](auto type) {
    using T = decltype(type);
    const Problem<T> problem{mma::int_of(kOp, q.size(0)),
                             mma::int_of(kOp, q.size(1)),
                             mma::int_of(kOp, q.size(2)),
                             mma::int_of(kOp, k.size(2)),
                             static_cast<float>(scale),
                             mma::heads_of<T>(kOp, "q", q),
                             mma::heads_of<T>(kOp, "k_self", k_self),
                             mma::heads_of<T>(kOp, "v_self", v_self),
                             mma::heads_of<T>(kOp, "k", k),
                             mma::heads_of<T>(kOp, "v", v),
                             reinterpret_cast<const uint32_t*>(bits.const_data_ptr<int32_t>()),
                             bits.stride(0),
                             bits.stride(1),
                             bits.stride(2),
                             mma::output_heads_of<T>(output),
                             lse.mutable_data_ptr<float>()};
    if (mma::int_of(kOp, problem.blocks()) == 0) return;
    ZS3FAST_LAUNCH(forward(problem, mma::int_of(kOp, q.size(3)), device.stream()));
  });
  return {output, lse};
}

}  // namespace
}  // namespace zs3fast::proposal_attention

TORCH_LIBRARY_IMPL(zs3fast_cpp, CUDA, m) { m.impl("proposal_attention", zs3fast::proposal_attention::attend); }
