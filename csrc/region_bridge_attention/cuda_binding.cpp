// region_bridge_attention, CUDA: the forward pass in one launch (cuda_kernel.h, cuda_wgmma_kernel.h).
#include <torch/library.h>

#include "cuda/mma_binding.h"
#include "region_bridge_attention/cuda.h"

namespace zs3fast::region_bridge_attention {
namespace {

constexpr char kOp[] = "region_bridge_attention";

template <bool kWgmma>
std::tuple<at::Tensor, at::Tensor> attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                          int64_t num_prefix, at::IntArrayRef grid, at::IntArrayRef regions,
                                          double scale) {
  mma::int_of(kOp, k.size(2));  // of which all other counts of tokens are parts
  const auto problem = [&](auto type, auto output, float* lse) {
    using T = decltype(type);
    return Problem<T>{mma::int_of(kOp, q.size(0)),
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
                      output,
                      lse};
  };
  return mma::attention<kWgmma>(kOp, q, problem);
}

}  // namespace
}  // namespace zs3fast::region_bridge_attention

TORCH_LIBRARY_IMPL(zs3fast_cpp, CUDA, m) {
  m.impl("region_bridge_attention", zs3fast::region_bridge_attention::attend<false>);
#ifdef ZS3FAST_WGMMA
  m.impl("region_bridge_attention_wgmma", zs3fast::region_bridge_attention::attend<true>);
#endif
}
