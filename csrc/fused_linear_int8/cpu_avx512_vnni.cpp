// By vpdpbusd.
#include "fused_linear_int8/loops.h"
#include "int8_dots.h"

namespace zs3fast::fused_linear_int8 {
const Kernel kernel_avx512_vnni{"avx512_vnni",
                                {pack_blocks<float>, pack_blocks<uint16_t>},
                                {run_tasks<Int8Dots, float>, run_tasks<Int8Dots, uint16_t>}};
}  // namespace zs3fast::fused_linear_int8
