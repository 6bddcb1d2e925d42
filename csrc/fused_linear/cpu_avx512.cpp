// float32, by multiply-adds.
#include "fused_linear/loops.h"
#include "simd.h"

namespace zs3fast::fused_linear {
namespace {

struct MultiplyAdds {
  static void begin() {}
  static void end() {}
  static void multiply(int64_t rows, int64_t depth, const float* a, int64_t lda, const float* b, float* c,
                       bool accumulate, int64_t columns) {
    gemm(rows, (columns + 15) / 16 * 16, depth, a, lda, 1, b, kBlock, c, kBlock, accumulate);
  }
};

}  // namespace

const Kernel kernel_avx512{"avx512", false, pack_blocks<float>, run_tasks<MultiplyAdds, float>};

}  // namespace zs3fast::fused_linear
