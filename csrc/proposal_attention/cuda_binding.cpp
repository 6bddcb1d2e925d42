// proposal_attention, CUDA: the forward pass in one launch (cuda_kernel.h, cuda_wgmma_kernel.h).
#include <torch/library.h>

#include "cuda/mma_binding.h"
#include "proposal_attention/cuda.h"

namespace zs3fast::proposal_attention {
namespace {

constexpr char kOp[] = "proposal_attention";

template <bool kWgmma>
std::tuple<at::Tensor, at::Tensor> attend(const at::Tensor& q, const at::Tensor& k_self, const at::Tensor& v_self,
                                          const at::Tensor& k, const at::Tensor& v, const at::Tensor& bits,
                                          double scale) {
  const auto problem = [&](auto type, auto output, float* lse) {
    using T = decltype(type);
    return Problem<T>{mma::int_of(kOp, q.size(0)),
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
                      output,
                      lse};
  };
  return mma::attention<kWgmma>(kOp, q, problem);
}

}  // namespace
}  // namespace zs3fast::proposal_attention

TORCH_LIBRARY_IMPL(zs3fast_cpp, CUDA, m) {
  m.impl("proposal_attention", zs3fast::proposal_attention::attend<false>);
#ifdef ZS3FAST_WGMMA
  m.impl("proposal_attention_wgmma", zs3fast::proposal_attention::attend<true>);
#endif
}
