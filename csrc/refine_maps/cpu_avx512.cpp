#define ZS3FAST_ISA kernels_avx512
#include "refine_maps/kernel_impl.h"
