#define ZS3FAST_ISA kernels_baseline
#include "masks_to_bits/kernel_impl.h"
