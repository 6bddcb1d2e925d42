// What cuda.cu offers: the forward pass in one launch.
#pragma once

#include <cuda_runtime_api.h>

#include "region_bridge_attention/cuda_problem.h"

namespace zs3fast::region_bridge_attention {

// T: cuda::Half or cuda::BFloat16. Heads of dh = 32, 64 or 128 columns, at least one block.
template <class T>
cudaError_t forward(const Problem<T>& problem, int dh, cudaStream_t stream);

// The same by wgmma, where the extension was built for sm_90a: of 64 or 128 columns, and keys and values whose tokens
// do not all lie at the same place.
template <class T>
cudaError_t forward_wgmma(const Problem<T>& problem, int dh, cudaStream_t stream);

}  // namespace zs3fast::region_bridge_attention
