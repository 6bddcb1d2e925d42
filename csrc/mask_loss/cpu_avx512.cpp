#define ZS3FAST_ISA kernels_avx512
#include "mask_loss/kernel_impl.h"
