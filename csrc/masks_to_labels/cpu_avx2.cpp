#define ZS3FAST_ISA avx2
#include "one_window.h"
#include "windows.h"
