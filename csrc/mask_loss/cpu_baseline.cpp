#define ZS3FAST_ISA kernels_baseline
#include "mask_loss/kernel_impl.h"
