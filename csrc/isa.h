// The instruction set CPU kernels run on. torch decides, so ATEN_CPU_CAPABILITY=default|avx2|avx512 lowers it here too.
#pragma once

namespace zs3fast {

enum class Isa { baseline, avx2, avx512 };

Isa isa();
const char* isa_name();

}  // namespace zs3fast
