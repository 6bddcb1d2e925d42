// fused_linear, CPU: the instruction set chosen, and the binding.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "cpu_features.h"
#include "flat_rows.h"
#include "fused_linear/kernel.h"
#include "isa.h"
#include "workspace.h"

namespace zs3fast::fused_linear {
namespace {

struct Choice {
  const Kernel* kernel;
  bool faster;  // than torch's own product, as far as was measured
};

// The kernels that this machine runs, the fastest first.
std::vector<Choice> kernels(bool bf16) {
  std::vector<Choice> able;
#if defined(__x86_64__)
  const auto& cpu = cpu_features();
  if (bf16) {
#if defined(ZS3FAST_AMX)
    if (cpu.amx_bf16) able.push_back({&kernel_amx, true});
#endif
#if defined(ZS3FAST_AVX512_BF16)
    if (cpu.avx512_bf16) able.push_back({&kernel_avx512_bf16, cpu.zen5});
#endif
  } else if (isa() == Isa::avx512) {
    able.push_back({&kernel_avx512, cpu.zen5});
  }
#endif
  return able;
}

// The problem of `step` rows from one on.
Problem rows_of(Problem f, int64_t first, int64_t step, int64_t size) {
  const auto at = [&](const void* x, int64_t stride) { return static_cast<const char*>(x) + first * stride * size; };
  f.x = at(f.x, f.x_stride);
  if (f.residual) f.residual = at(f.residual, f.residual_stride);
  f.out = const_cast<char*>(at(f.out, f.out_stride));
  f.rows = std::min(step, f.rows - first);
  return f;
}

at::Tensor by_kernel(const Kernel& kernel, const at::Tensor& x_in, const at::Tensor& weight_in,
                     const std::optional<at::Tensor>& bias_in, const std::optional<at::Tensor>& residual_in,
                     int64_t activation) {
  auto sizes = x_in.sizes().vec();
  sizes.back() = weight_in.size(0);
  auto out = at::empty(sizes, x_in.options().memory_format(at::MemoryFormat::Contiguous));
  if (out.numel() == 0) return out;
  const auto x = flat_rows(x_in), weight = flat_rows(weight_in);
  at::Tensor bias, residual;
  if (bias_in) bias = bias_in->contiguous();
  if (residual_in) residual = flat_rows(*residual_in);
  Problem whole{x.size(0),
                  weight.size(0),
                  x.size(1),
                  x.data_ptr(),
                  weight.data_ptr(),
                  bias_in ? bias.data_ptr() : nullptr,
                  residual_in ? residual.data_ptr() : nullptr,
                  out.data_ptr(),
                  x.stride(0),
                  weight.stride(0),
                  residual_in ? residual.stride(0) : 0,
                  weight.size(0),
                  static_cast<Activation>(activation),
                  nullptr};
  // so many rows at a time that they fit the memory that the thread keeps, in parts of one size
  const int64_t block = kRows * std::max<int64_t>(x.size(1), 1) * x.element_size(), all = blocks(x.size(0));
  const int64_t most = std::max<int64_t>(kKeptBytes / block, 1), parts = (all + most - 1) / most;
  const int64_t step = (all + parts - 1) / parts;
  const Workspace room(step * block);
  whole.packed = room.bytes();
  for (int64_t first = 0; first < all; first += step) {
    const int64_t count = std::min(step, all - first);
    const Problem f = rows_of(whole, first * kRows, step * kRows, x.element_size());
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { kernel.pack(f, begin, end); });
    at::parallel_for(0, count * panels(f.outputs), 1, [&](int64_t begin, int64_t end) { kernel.run(f, begin, end); });
  }
  return out;
}

at::Tensor by_name(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                   const std::optional<at::Tensor>& residual, int64_t activation, std::string_view name) {
  const auto same = [&](const at::Tensor& y) { return y.scalar_type() == x.scalar_type() && y.device() == x.device(); };
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16,
              "fused_linear: expected float32 or bfloat16, got ", x.scalar_type());
  TORCH_CHECK(x.dim() >= 1 && weight.dim() == 2 && weight.size(1) == x.size(-1) && same(weight),
              "fused_linear: weight: expected [out, in = ", x.dim() ? x.size(-1) : 0, "] of x's type, got ",
              weight.sizes());
  TORCH_CHECK(weight.size(0) % 32 == 0 && weight.size(1) % 32 == 0,
              "fused_linear: weight: expected sides of multiples of 32, got ", weight.sizes());
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0) && same(*bias)),
              "fused_linear: bias: expected [", weight.size(0), "] of x's type");
  TORCH_CHECK(0 <= activation && activation <= 3, "fused_linear: activation: expected 0 to 3, got ", activation);
  if (residual) {
    auto sizes = x.sizes().vec();
    sizes.back() = weight.size(0);
    TORCH_CHECK(residual->sizes() == at::IntArrayRef(sizes) && same(*residual), "fused_linear: residual: expected ",
                at::IntArrayRef(sizes), " of x's type, got ", residual->sizes());
  }
  std::string known;
  for (const auto& choice : kernels(x.scalar_type() == at::kBFloat16)) {
    if (name.empty() || name == choice.kernel->name)
      return by_kernel(*choice.kernel, x, weight, bias, residual, activation);
    known += (known.empty() ? "" : ", ") + std::string(choice.kernel->name);
  }
  TORCH_CHECK(false, "fused_linear: kernel: expected one of ", known, " here, got ", name);
}

at::Tensor forward(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                   const std::optional<at::Tensor>& residual, int64_t activation) {
  return by_name(x, weight, bias, residual, activation, "");
}

std::vector<std::string> names(bool bf16) {
  std::vector<std::string> found;
  for (const auto& choice : kernels(bf16)) found.emplace_back(choice.kernel->name);
  return found;
}

bool faster(bool bf16) {
  const auto able = kernels(bf16);
  return !able.empty() && able.front().faster;
}

}  // namespace
}  // namespace zs3fast::fused_linear

TORCH_LIBRARY_IMPL(zs3fast_cpp, CPU, m) {
  m.impl("fused_linear", zs3fast::fused_linear::forward);
  m.impl("fused_linear_by", zs3fast::fused_linear::by_name);
}

TORCH_LIBRARY_IMPL(zs3fast_cpp, BackendSelect, m) {  // they take no tensor
  m.impl("fused_linear_kernels", zs3fast::fused_linear::names);
  m.impl("fused_linear_faster", zs3fast::fused_linear::faster);
}
