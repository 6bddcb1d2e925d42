#define ZS3FAST_ISA kernels_avx512
#include "proposal_attention/kernel_impl.h"
