// The body of the Hopper kernel run by the emulation, for tests: every block of a request, one after the other.
#include "emulated/proposal_attention.h"
#include "proposal_attention/cuda_wgmma_kernel.h"

namespace {

using namespace zs3fast;

template <class T, int kDh>
void run(const Entry& entry, const int64_t* sizes, float scale) {
  using S = wgmma::Shape<kDh>;
  const auto p = proposals_problem<T>(entry, sizes, scale);
  const auto map = [&](const mma::Heads<const T>& x) { return map_of(x, p.images, p.heads, p.patches, kDh, S::kKeys); };
  const wgmma::Map k = map(p.k), v = map(p.v);
  for (int program = 0; program < p.images * p.heads * proposal_attention::hopper_blocks(p, S::kRows); ++program)
    wgmma::Launch(S::kWarps, S::kShared, [&](wgmma::Block& block) {
      proposal_attention::attend<T, kDh>(block, p, k, v, program);
    }).run();
}

}  // namespace

// Tensors: q, k_self, v_self, k, v, bits, output, lse. Sizes: B, heads, proposals, patches.
ZS3FAST_WIDE_ENTRY(proposal_attention_wgmma)
