#define ZS3FAST_ISA avx512
#include "one_window.h"
#include "windows.h"
