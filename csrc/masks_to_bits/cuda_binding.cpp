// masks_to_bits, CUDA: one launch for all masks (cuda_kernel.h).
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cuda/launch.h"
#include "masks_to_bits/cuda.h"

namespace zs3fast::masks_to_bits {
namespace {

at::Tensor masks_to_bits(const at::Tensor& masks, at::IntArrayRef grid, at::IntArrayRef padded, bool align_corners,
                         bool logits) {
  const cuda::Device device(masks);
  const int64_t patches = grid[0] * grid[1], words = (patches + 31) / 32;
  auto bits = at::empty({masks.size(0), masks.size(1), words}, masks.options().dtype(at::kInt));
  if (bits.numel() == 0) return bits;
  const int64_t count = masks.size(0) * masks.size(1);
  TORCH_CHECK(count <= INT32_MAX && words <= 65535 * (kThreads / 32) && masks.size(2) <= INT32_MAX &&
                  masks.size(3) <= INT32_MAX && padded[0] <= INT32_MAX && padded[1] <= INT32_MAX,
              "masks_to_bits: too large for one launch: masks ", masks.sizes(), ", grid ", grid);
  CudaRequest request{};
  request.masks = masks.const_data_ptr();
  request.stride_b = masks.stride(0), request.stride_q = masks.stride(1);
  request.stride_y = masks.stride(2), request.stride_x = masks.stride(3);
  request.count = static_cast<int32_t>(count), request.proposals = static_cast<int32_t>(masks.size(1));
  request.grid_w = static_cast<int32_t>(grid[1]);
  request.patches = static_cast<int32_t>(patches), request.words = static_cast<int32_t>(words);
  request.logits = logits;
  request.padded_y = gpu::resize(masks.size(2), padded[0], align_corners);
  request.padded_x = gpu::resize(masks.size(3), padded[1], align_corners);
  request.grid_y = gpu::resize(padded[0], grid[0], false);
  request.grid_x = gpu::resize(padded[1], grid[1], false);
  request.bits = reinterpret_cast<uint32_t*>(bits.mutable_data_ptr<int32_t>());
  ZS3FAST_LAUNCH(run(request, cuda::element_of(masks), device.stream()));
  return bits;
}

}  // namespace

TORCH_LIBRARY_IMPL(zs3fast_cpp, CUDA, m) { m.impl("masks_to_bits", masks_to_bits); }

}  // namespace zs3fast::masks_to_bits
