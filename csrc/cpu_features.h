// What a CPU kernel may ask of the machine beyond isa.h; all false below AVX-512 or where torch was told to stay below.
#pragma once

namespace zs3fast {

struct CpuFeatures {
  bool avx512_bf16 = false;
  bool avx512_vnni = false;
  // 512-bit units measured at full rate, vdpbf16ps at twice that, and MKL at the rate of AVX2 (docs/performance.md).
  bool zen5 = false;
  bool amx_bf16 = false;  // there, and allowed to this process by the operating system
  bool amx_int8 = false;
};

const CpuFeatures& cpu_features();

}  // namespace zs3fast
