#define ZS3FAST_ISA kernels_avx2
#include "refine_maps/kernel_impl.h"
