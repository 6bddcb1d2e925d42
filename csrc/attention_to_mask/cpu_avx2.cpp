#define ZS3FAST_ISA kernels_avx2
#include "attention_to_mask/kernel_impl.h"
