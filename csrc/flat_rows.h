// Tensors as rows.
#pragma once

#include <ATen/core/Tensor.h>

namespace zs3fast {

// [..., depth] as [rows, depth], without a copy where they lie evenly.
inline at::Tensor flat_rows(const at::Tensor& x) {
  const auto flat = x.reshape({-1, x.size(-1)});
  return flat.stride(1) == 1 || flat.size(1) == 1 ? flat : flat.contiguous();
}

}  // namespace zs3fast
