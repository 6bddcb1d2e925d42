#define ZS3FAST_ISA kernels_baseline
#include "proposal_attention/kernel_impl.h"
