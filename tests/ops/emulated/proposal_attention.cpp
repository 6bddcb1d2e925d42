// The body of the CUDA kernel run by the emulation, for tests: every block of a request, one after the other.
#include "emulated/proposal_attention.h"
#include "proposal_attention/cuda_kernel.h"

namespace {

using namespace zs3fast;

template <class T, int kDh>
void run(const Entry& entry, const int64_t* sizes, float scale) {
  const auto p = proposals_problem<T>(entry, sizes, scale);
  constexpr int kWarps = proposal_attention::kWarps<kDh>;
  for (int program = 0; program < p.blocks(); ++program)
    mma::Launch(kWarps, mma::kMaskedRowsShared<kDh, kWarps>, [&](mma::Block& block) {
      proposal_attention::attend<T, kDh>(block, p, program);
    }).run();
}

}  // namespace

// Tensors: q, k_self, v_self, k, v, bits, output, lse. Sizes: B, heads, proposals, patches.
ZS3FAST_ENTRY(proposal_attention)
