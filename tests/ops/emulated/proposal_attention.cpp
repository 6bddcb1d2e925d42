// The body of the CUDA kernel run by the emulation, for tests: every block of a request, one after the other.
#include "emulated/entry.h"
#include "proposal_attention/cuda_kernel.h"

namespace {

using namespace zs3fast;

template <class T, int kDh>
void run(const Entry& entry, const int64_t* sizes, float scale) {
  int n[4];
  for (int i = 0; i < 4; ++i) n[i] = static_cast<int>(sizes[i]);
  const proposal_attention::Problem<T> p{n[0],
                                         n[1],
                                         n[2],
                                         n[3],
                                         scale,
                                         entry.heads<const T>(0),
                                         entry.heads<const T>(1),
                                         entry.heads<const T>(2),
                                         entry.heads<const T>(3),
                                         entry.heads<const T>(4),
                                         entry.data<const uint32_t>(5),
                                         entry.stride(5, 0),
                                         entry.stride(5, 1),
                                         entry.stride(5, 2),
                                         entry.heads<T>(6),
                                         entry.data<float>(7)};
  constexpr int kWarps = proposal_attention::kWarps<kDh>;
  for (int program = 0; program < p.blocks(); ++program)
    mma::Launch(kWarps, mma::kMaskedRowsShared<kDh, kWarps>, [&](mma::Block& block) {
      proposal_attention::attend<T, kDh>(block, p, program);
    }).run();
}

}  // namespace

// Tensors: q, k_self, v_self, k, v, bits, output, lse. Sizes: B, heads, proposals, patches.
ZS3FAST_ENTRY(proposal_attention)
