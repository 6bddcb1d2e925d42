#define ZS3FAST_ISA avx512
#include "proposals_to_labels/kernel_impl.h"
