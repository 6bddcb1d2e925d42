// encoder_attention for other ops of the CPU: plain attention over [B, heads, tokens, dh] as a part of theirs.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

#include "encoder_attention/kernel.h"

namespace zs3fast::encoder_attention {

// The type it is computed in: bfloat16 as such, all else as float32.
inline at::ScalarType computed_in(at::ScalarType type) { return type == at::kBFloat16 ? at::kBFloat16 : at::kFloat; }

// What there is to know of a tensor [B, heads, tokens, dh] of that type with neighbouring columns.
Tokens heads_first(const at::Tensor& x);

// softmax(scale q k^T) v by the kernel of this name, the fastest that this machine runs if empty, on all threads.
// output and lse ([B, heads, queries], rows of `lse_stride`; or null) are written.
void attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& output, float* lse,
            int64_t lse_stride, double scale, std::string_view name = {});

}  // namespace zs3fast::encoder_attention
