// What cuda.cu offers: one launch for all masks.
#pragma once

#include <cuda_runtime_api.h>

#include "masks_to_bits/cuda_kernel.h"

namespace zs3fast::masks_to_bits {

cudaError_t run(const CudaRequest& q, cuda::Element element, cudaStream_t stream);

}  // namespace zs3fast::masks_to_bits
