// The body of the CUDA kernel run by the emulation, for tests: every block of a request, one after the other.
#include "emulated/region_bridge_attention.h"
#include "region_bridge_attention/cuda_kernel.h"

namespace {

using namespace zs3fast;

template <class T, int kDh>
void run(const Entry& entry, const int64_t* sizes, float scale) {
  const auto p = bridge_problem<T>(entry, sizes, scale);
  for (int program = 0; program < p.blocks(); ++program)
    mma::Launch(region_bridge_attention::kWarps, region_bridge_attention::kShared<kDh>, [&](mma::Block& block) {
      region_bridge_attention::attend<T, kDh>(block, p, program);
    }).run();
}

}  // namespace

// Tensors: q, k, v, output, lse. Sizes: B, heads, prefix_q, prefix_k, h, w, rh, rw.
ZS3FAST_ENTRY(region_bridge_attention)
