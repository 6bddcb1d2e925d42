#define ZS3FAST_ISA kernels_baseline
#include "refine_maps/kernel_impl.h"
