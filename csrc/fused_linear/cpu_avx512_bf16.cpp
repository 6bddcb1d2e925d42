// By vdpbf16ps.
#include "bf16_dots.h"
#include "fused_linear/loops.h"

namespace zs3fast::fused_linear {
const Kernel kernel_avx512_bf16{"avx512_bf16", true, pack_blocks<uint16_t>, run_tasks<Dots, uint16_t>};
}  // namespace zs3fast::fused_linear
