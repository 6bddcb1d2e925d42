#define ZS3FAST_ISA avx2
#include "proposals_to_labels/kernel_impl.h"
