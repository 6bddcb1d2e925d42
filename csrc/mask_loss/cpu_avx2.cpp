#define ZS3FAST_ISA kernels_avx2
#include "mask_loss/kernel_impl.h"
