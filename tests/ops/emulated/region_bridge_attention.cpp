// The body of the CUDA kernel run by the emulation, for tests: every block of a request, one after the other.
#include "emulated/entry.h"
#include "region_bridge_attention/cuda_kernel.h"

namespace {

using namespace zs3fast;

template <class T, int kDh>
void run(const Entry& entry, const int64_t* sizes, float scale) {
  int n[8];
  for (int i = 0; i < 8; ++i) n[i] = static_cast<int>(sizes[i]);
  const region_bridge_attention::Problem<T> p{
      n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], scale, entry.heads<const T>(0), entry.heads<const T>(1),
      entry.heads<const T>(2), entry.heads<T>(3), entry.data<float>(4)};
  for (int program = 0; program < p.blocks(); ++program)
    mma::Launch(region_bridge_attention::kWarps, region_bridge_attention::kShared<kDh>, [&](mma::Block& block) {
      region_bridge_attention::attend<T, kDh>(block, p, program);
    }).run();
}

}  // namespace

// Tensors: q, k, v, output, lse. Sizes: B, heads, prefix_q, prefix_k, h, w, rh, rw.
ZS3FAST_ENTRY(region_bridge_attention)
