// By vdpbf16ps.
#include "bf16_dots.h"
#include "encoder_attention/pairs.h"

namespace zs3fast::encoder_attention {
const Kernel kernel_avx512_bf16{"avx512_bf16", true, tasks_of, run_tasks<PairProducts<Dots>>};
}  // namespace zs3fast::encoder_attention
