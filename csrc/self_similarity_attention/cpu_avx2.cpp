#define ZS3FAST_ISA kernels_avx2
#include "self_similarity_attention/kernel_impl.h"
