#define ZS3FAST_ISA kernels_baseline
#include "attention_to_mask/kernel_impl.h"
