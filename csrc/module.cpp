// The Python module zs3fast._C: what it was built with. Importing it also registers every CPU kernel linked into it.
#include <pybind11/pybind11.h>

#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <string>

#include "isa.h"

namespace zs3fast {

// _extension.py reads this mark from the file before it loads it: a library made for another torch may not load at all.
[[gnu::used]] const char built_for[] = "zs3fast-built-for-torch=" ZS3FAST_TORCH_VERSION ";";

Isa isa() {
  static const Isa chosen = [] {
#if defined(__x86_64__)
    const std::string capability = at::get_cpu_capability();
    if (capability.find("AVX512") != std::string::npos) return Isa::avx512;
    if (capability.find("AVX2") != std::string::npos) return Isa::avx2;
#endif
    return Isa::baseline;
  }();
  return chosen;
}

const char* isa_name() {
  switch (isa()) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "default";
  }
}

}  // namespace zs3fast

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled CPU kernels of zs3fast.";
  module.attr("torch_version") = ZS3FAST_TORCH_VERSION;
  module.attr("compiler") = __VERSION__;
  module.attr("cuda_archs") = ZS3FAST_CUDA_ARCHS;
  module.def("cpu_capability", &zs3fast::isa_name, "The instruction set the kernels run on: avx512, avx2 or default.");
  module.def("num_threads", &at::get_num_threads, "Threads a kernel uses: torch.get_num_threads().");
}
