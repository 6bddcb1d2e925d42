#define ZS3FAST_ISA kernels_baseline
#include "region_bridge_attention/kernel_impl.h"
