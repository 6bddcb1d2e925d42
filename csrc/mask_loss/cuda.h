// What cuda.cu offers: two launches a direction, on workspace of the caller's.
#pragma once

#include <cuda_runtime_api.h>

#include "mask_loss/cuda_kernel.h"

namespace zs3fast::mask_loss {

// sums [4, B, C]; partial [4, B, tile_rows * strips, C] is workspace.
cudaError_t start_forward(const CudaProblem& q, float* partial, float* sums, cudaStream_t stream);

// out [B, C, h, w] in the type of the logits; corners [4, B, tile_rows * tile_columns, C] is workspace.
cudaError_t start_backward(const CudaProblem& q, const Gradients& grad, float* corners, void* out, cudaStream_t stream);

}  // namespace zs3fast::mask_loss
