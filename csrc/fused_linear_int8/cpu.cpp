// fused_linear_int8, CPU: the instruction set chosen, and the binding.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "cpu_features.h"
#include "flat_rows.h"
#include "fused_linear_int8/kernel.h"
#include "workspace.h"

namespace zs3fast::fused_linear_int8 {
namespace {

// The kernels that this machine runs, the fastest first.
std::vector<const Kernel*> kernels() {
  std::vector<const Kernel*> able;
#if defined(__x86_64__)
  [[maybe_unused]] const auto& cpu = cpu_features();
#if defined(ZS3FAST_AMX)
  if (cpu.amx_int8) able.push_back(&kernel_amx);
#endif
#if defined(ZS3FAST_AVX512_VNNI)
  if (cpu.avx512_vnni) able.push_back(&kernel_avx512_vnni);
#endif
#endif
  return able;
}

// The problem of `step` rows from one on.
Problem part_of(Problem f, int64_t first, int64_t step, int64_t size) {
  const auto at = [&](const void* x, int64_t stride) { return static_cast<const char*>(x) + first * stride * size; };
  f.x = at(f.x, f.x_stride);
  if (f.residual) f.residual = at(f.residual, f.residual_stride);
  f.out = const_cast<char*>(at(f.out, f.out_stride));
  f.rows = std::min(step, f.rows - first);
  return f;
}

at::Tensor by_kernel(const Kernel& kernel, const at::Tensor& x_in, const at::Tensor& weight_in,
                     const at::Tensor& scale_in, const std::optional<at::Tensor>& bias_in,
                     const std::optional<at::Tensor>& residual_in, int64_t activation) {
  auto sizes = x_in.sizes().vec();
  sizes.back() = weight_in.size(0);
  auto out = at::empty(sizes, x_in.options().memory_format(at::MemoryFormat::Contiguous));
  if (out.numel() == 0) return out;
  const auto x = flat_rows(x_in), weight = flat_rows(weight_in), scale = scale_in.contiguous();
  at::Tensor bias, residual;
  if (bias_in) bias = bias_in->contiguous();
  if (residual_in) residual = flat_rows(*residual_in);
  Problem whole{x.size(0),
                weight.size(0),
                x.size(1),
                x.data_ptr(),
                weight.data_ptr<int8_t>(),
                scale.data_ptr<float>(),
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
  const int64_t bytes = block_bytes(x.size(1)), all = blocks(x.size(0));
  const int64_t most = std::max<int64_t>(kKeptBytes / bytes, 1), parts = (all + most - 1) / most;
  const int64_t step = (all + parts - 1) / parts;
  const bool bf16 = x.scalar_type() == at::kBFloat16;
  const Workspace room(step * bytes);
  whole.packed = room.bytes();
  for (int64_t first = 0; first < all; first += step) {
    const int64_t count = std::min(step, all - first);
    const Problem f = part_of(whole, first * kRows, step * kRows, x.element_size());
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { kernel.pack[bf16](f, begin, end); });
    at::parallel_for(0, count * panels(f.outputs), 1,
                     [&](int64_t begin, int64_t end) { kernel.run[bf16](f, begin, end); });
  }
  return out;
}

at::Tensor by_name(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale,
                   const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual, int64_t activation,
                   std::string_view name) {
  const auto same = [&](const at::Tensor& y) { return y.scalar_type() == x.scalar_type() && y.device() == x.device(); };
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16,
              "fused_linear_int8: expected float32 or bfloat16, got ", x.scalar_type());
  TORCH_CHECK(x.dim() >= 1 && weight.dim() == 2 && weight.size(1) == x.size(-1) && weight.scalar_type() == at::kChar &&
                  weight.device() == x.device(),
              "fused_linear_int8: weight: expected int8 [out, in = ", x.dim() ? x.size(-1) : 0, "], got ",
              weight.scalar_type(), " ", weight.sizes());
  TORCH_CHECK(weight.size(0) % 32 == 0 && weight.size(1) % 64 == 0 && weight.size(1) <= kMaxDepth,
              "fused_linear_int8: weight: expected sides of multiples of 32 and 64, the second up to ", kMaxDepth,
              ", got ", weight.sizes());
  TORCH_CHECK(scale.dim() == 1 && scale.size(0) == weight.size(0) && scale.scalar_type() == at::kFloat &&
                  scale.device() == x.device(),
              "fused_linear_int8: scale: expected float32 [", weight.size(0), "], got ", scale.scalar_type(), " ",
              scale.sizes());
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0) && same(*bias)),
              "fused_linear_int8: bias: expected [", weight.size(0), "] of x's type");
  TORCH_CHECK(0 <= activation && activation <= 3, "fused_linear_int8: activation: expected 0 to 3, got ", activation);
  if (residual) {
    auto sizes = x.sizes().vec();
    sizes.back() = weight.size(0);
    TORCH_CHECK(residual->sizes() == at::IntArrayRef(sizes) && same(*residual), "fused_linear_int8: residual: expected ",
                at::IntArrayRef(sizes), " of x's type, got ", residual->sizes());
  }
  std::string known;
  for (const auto* kernel : kernels()) {
    if (name.empty() || name == kernel->name) return by_kernel(*kernel, x, weight, scale, bias, residual, activation);
    known += (known.empty() ? "" : ", ") + std::string(kernel->name);
  }
  TORCH_CHECK(false, "fused_linear_int8: kernel: expected one of ", known, " here, got ", name);
}

at::Tensor forward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale,
                   const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual,
                   int64_t activation) {
  return by_name(x, weight, scale, bias, residual, activation, "");
}

std::vector<std::string> names() {
  std::vector<std::string> found;
  for (const auto* kernel : kernels()) found.emplace_back(kernel->name);
  return found;
}

}  // namespace
}  // namespace zs3fast::fused_linear_int8

TORCH_LIBRARY_IMPL(zs3fast_cpp, CPU, m) {
  m.impl("fused_linear_int8", zs3fast::fused_linear_int8::forward);
  m.impl("fused_linear_int8_by", zs3fast::fused_linear_int8::by_name);
}

TORCH_LIBRARY_IMPL(zs3fast_cpp, BackendSelect, m) {  // it takes no tensor
  m.impl("fused_linear_int8_kernels", zs3fast::fused_linear_int8::names);
}
