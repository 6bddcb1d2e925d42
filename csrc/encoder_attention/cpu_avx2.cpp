#include "encoder_attention/kernel_impl.h"

namespace zs3fast::encoder_attention {
const Kernel kernel_avx2{"avx2", false, tasks_of, run_tasks<FloatProducts>};
}  // namespace zs3fast::encoder_attention
