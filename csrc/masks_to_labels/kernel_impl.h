// The kernels of request.h, compiled once an instruction set: the including file names it in ZS3FAST_ISA.
#include "masks_to_labels/one_window.h"
#include "masks_to_labels/windows.h"
