#define ZS3FAST_ISA kernels_baseline
#include "self_similarity_attention/kernel_impl.h"
