#define ZS3FAST_ISA kernels_avx512
#include "region_bridge_attention/kernel_impl.h"
