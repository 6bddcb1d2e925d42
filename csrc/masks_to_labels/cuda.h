// What cuda.cu offers: one launch.
#pragma once

#include <cuda_runtime_api.h>

#include "masks_to_labels/cuda_kernel.h"

namespace zs3fast::masks_to_labels {

cudaError_t one_window(const CudaRequest& q, cudaStream_t stream);

}  // namespace zs3fast::masks_to_labels
