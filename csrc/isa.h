// The instruction set CPU kernels run on. torch decides, so ATEN_CPU_CAPABILITY=default|avx2|avx512 lowers it here too.
//
// csrc/<op>/kernel_impl.h is compiled once for each: CMake writes a file that includes it with ZS3FAST_ISA set to
// kernels_baseline, kernels_avx2 and kernels_avx512, the name of what it defines (a constant or a namespace).
#pragma once

namespace zs3fast {

enum class Isa { baseline, avx2, avx512 };

Isa isa();
const char* isa_name();

}  // namespace zs3fast

// `member` of what the instruction set at hand is to run: ZS3FAST_FOR_ISA() is the constant itself.
#if defined(__x86_64__)
#define ZS3FAST_FOR_ISA(member)                                          \
  (::zs3fast::isa() == ::zs3fast::Isa::avx512 ? kernels_avx512 member    \
   : ::zs3fast::isa() == ::zs3fast::Isa::avx2 ? kernels_avx2 member      \
                                              : kernels_baseline member)
#else
#define ZS3FAST_FOR_ISA(member) (kernels_baseline member)
#endif
