#include "cpu_features.h"

#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace zs3fast {
namespace {

#if defined(__x86_64__)
unsigned amd_family() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(0, &a, &b, &c, &d)) return 0;
  if (b != signature_AMD_ebx || c != signature_AMD_ecx || d != signature_AMD_edx) return 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
  return (a >> 8 & 15) + (a >> 20 & 255);
}

bool system_saves_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;  // OSXSAVE
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low >> 17 & 3) == 3;
}

// Linux gives the room for tiles to a process that asks for it, once.
bool tiles_permitted() {
#if defined(__linux__)
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
  return false;
#endif
}
#endif

CpuFeatures find() {
  CpuFeatures found;
#if defined(__x86_64__)
  if (isa() != Isa::avx512) return found;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) found.avx512_bf16 = a >> 5 & 1;
  found.zen5 = found.avx512_bf16 && amd_family() >= 26;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    found.avx512_vnni = c >> 11 & 1;
    const bool multiplies_bf16 = d >> 22 & 1, there = d >> 24 & 1, multiplies_int8 = d >> 25 & 1;
    const bool tiles = there && found.avx512_bf16 && system_saves_tiles() && tiles_permitted();
    found.amx_bf16 = tiles && multiplies_bf16;
    found.amx_int8 = tiles && multiplies_int8 && found.avx512_vnni;
  }
#endif
  return found;
}

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures found = find();
  return found;
}

}  // namespace zs3fast
