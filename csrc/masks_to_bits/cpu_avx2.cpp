#define ZS3FAST_ISA kernels_avx2
#include "masks_to_bits/kernel_impl.h"
