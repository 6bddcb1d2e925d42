// encoder_attention, CPU: the instruction set chosen, and the binding.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "cpu_features.h"
#include "encoder_attention/cpu.h"
#include "encoder_attention/kernel.h"
#include "isa.h"

namespace zs3fast::encoder_attention {
namespace {

// The kernels that this machine runs, the fastest first.
std::vector<const Kernel*> kernels(bool bf16) {
  std::vector<const Kernel*> able;
#if defined(__x86_64__)
  if (isa() == Isa::avx512) {
    if (bf16) {
#if defined(ZS3FAST_AMX)
      if (cpu_features().amx_bf16) able.push_back(&kernel_amx);
#endif
#if defined(ZS3FAST_AVX512_BF16)
      if (cpu_features().zen5) able.push_back(&kernel_avx512_bf16);
#endif
    }
    able.push_back(&kernel_avx512);
#if defined(ZS3FAST_AVX512_BF16)
    if (bf16 && cpu_features().avx512_bf16 && !cpu_features().zen5) able.push_back(&kernel_avx512_bf16);
#endif
  }
  if (isa() != Isa::baseline) able.push_back(&kernel_avx2);
#endif
  able.push_back(&kernel_baseline);
  return able;
}

void run(const Kernel& kernel, const Problem& f) {
  at::parallel_for(0, kernel.tasks(f), 1, [&](int64_t begin, int64_t end) { kernel.run(f, begin, end); });
}

const Kernel& named(std::string_view name, bool bf16) {
  std::string known;
  for (const Kernel* kernel : kernels(bf16)) {
    if (name.empty() || name == kernel->name) return *kernel;
    known += (known.empty() ? "" : ", ") + std::string(kernel->name);
  }
  TORCH_CHECK(false, "encoder_attention: kernel: expected one of ", known, " here, got ", name);
}

// What there is to know of a tensor [B, tokens, heads, dh].
Tokens tokens_of(const at::Tensor& x) {
  return {x.data_ptr(), x.size(0) == 1 ? 0 : x.stride(0), x.stride(1), x.stride(2), x.size(1)};
}

at::Tensor readable(const at::Tensor& x, at::ScalarType type) {
  const auto y = x.to(type);
  return y.size(3) <= 1 || y.stride(3) == 1 ? y : y.clone(at::MemoryFormat::Contiguous);
}

void check(const at::Tensor& x, const char* name, const at::Tensor& q, int64_t batch, int64_t tokens) {
  TORCH_CHECK(x.dim() == 4 && (x.size(0) == q.size(0) || x.size(0) == batch) && x.size(1) == tokens &&
                  x.size(2) == q.size(2) && x.size(3) == q.size(3) && x.scalar_type() == q.scalar_type() &&
                  x.device() == q.device(),
              "encoder_attention: ", name, ": expected [B, tokens, heads, dh] = [", q.size(0), ", ", tokens, ", ",
              q.size(2), ", ", q.size(3), "] of q's type and device, got ", x.sizes());
}

at::Tensor by_kernel(const Kernel& kernel, const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in,
                     const std::optional<at::Tensor>& context_k_in, const std::optional<at::Tensor>& context_v_in,
                     double scale) {
  const auto type = q_in.scalar_type();
  const auto computed = kernel.bf16 || type == at::kBFloat16 ? at::kBFloat16 : at::kFloat;  // float16 as float32
  const auto q = readable(q_in, computed), k = readable(k_in, computed), v = readable(v_in, computed);
  auto output = at::empty(q.sizes(), q.options().memory_format(at::MemoryFormat::Contiguous));

  Problem f;
  f.element = computed == at::kBFloat16 ? Element::bfloat16 : Element::float32;
  f.batches = q.size(0);
  f.heads = q.size(2);
  f.dh = q.size(3);
  f.scale = static_cast<float>(scale);
  f.q = tokens_of(q);
  f.output = tokens_of(output);
  at::Tensor context_k, context_v;
  if (context_k_in) {
    context_k = readable(*context_k_in, computed);
    context_v = readable(*context_v_in, computed);
    f.k[0] = tokens_of(context_k);
    f.v[0] = tokens_of(context_v);
  }
  f.k[1] = tokens_of(k);
  f.v[1] = tokens_of(v);
  run(kernel, f);
  return output.to(type);
}

at::Tensor by_name(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                   const std::optional<at::Tensor>& context_k, const std::optional<at::Tensor>& context_v, double scale,
                   std::string_view name) {
  TORCH_CHECK(q.dim() == 4 && q.size(2) > 0 && q.size(3) > 0 && k.dim() == 4 && k.size(1) > 0,
              "encoder_attention: q and k: expected [B, tokens, heads, dh], with keys, got ", q.sizes(), " and ",
              k.sizes());
  TORCH_CHECK(q.scalar_type() == at::kFloat || q.scalar_type() == at::kBFloat16 || q.scalar_type() == at::kHalf,
              "encoder_attention: expected float32, bfloat16 or float16, got ", q.scalar_type());
  check(k, "k", q, q.size(0), k.size(1));
  check(v, "v", q, q.size(0), k.size(1));
  TORCH_CHECK(context_k.has_value() == context_v.has_value(),
              "encoder_attention: context_k and context_v: expected both or neither, got one");
  if (context_k) {
    TORCH_CHECK(context_k->dim() == 4, "encoder_attention: context_k: expected [B or 1, K, heads, dh], got ",
                context_k->sizes());
    check(*context_k, "context_k", q, 1, context_k->size(1));
    check(*context_v, "context_v", q, 1, context_k->size(1));
  }
  return by_kernel(named(name, q.scalar_type() == at::kBFloat16), q, k, v, context_k, context_v, scale);
}

at::Tensor forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                   const std::optional<at::Tensor>& context_k, const std::optional<at::Tensor>& context_v,
                   double scale) {
  return by_name(q, k, v, context_k, context_v, scale, "");
}

std::vector<std::string> names(bool bf16) {
  std::vector<std::string> found;
  for (const Kernel* kernel : kernels(bf16)) found.emplace_back(kernel->name);
  return found;
}

}  // namespace

Tokens heads_first(const at::Tensor& x) {
  return {x.data_ptr(), x.size(0) == 1 ? 0 : x.stride(0), x.stride(2), x.stride(1), x.size(2)};
}

void attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& output, float* lse,
            int64_t lse_stride, double scale, std::string_view name) {
  const bool bf16 = q.scalar_type() == at::kBFloat16;
  Problem f;
  f.element = bf16 ? Element::bfloat16 : Element::float32;
  f.batches = q.size(0);
  f.heads = q.size(1);
  f.dh = q.size(3);
  f.scale = static_cast<float>(scale);
  f.q = heads_first(q);
  f.k[1] = heads_first(k);
  f.v[1] = heads_first(v);
  f.output = heads_first(output);
  f.lse = lse;
  f.lse_stride = lse_stride;
  run(named(name, bf16), f);
}

}  // namespace zs3fast::encoder_attention

TORCH_LIBRARY_IMPL(zs3fast_cpp, CPU, m) {
  m.impl("encoder_attention", zs3fast::encoder_attention::forward);
  m.impl("encoder_attention_by", zs3fast::encoder_attention::by_name);
}

TORCH_LIBRARY_IMPL(zs3fast_cpp, BackendSelect, m) {  // it takes no tensor
  m.impl("encoder_attention_kernels", zs3fast::encoder_attention::names);
}
