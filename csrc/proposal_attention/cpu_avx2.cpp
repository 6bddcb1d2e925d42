#define ZS3FAST_ISA kernels_avx2
#include "proposal_attention/kernel_impl.h"
