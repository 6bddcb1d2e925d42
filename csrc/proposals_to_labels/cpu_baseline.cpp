#define ZS3FAST_ISA baseline
#include "proposals_to_labels/kernel_impl.h"
