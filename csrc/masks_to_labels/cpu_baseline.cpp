#define ZS3FAST_ISA baseline
#include "one_window.h"
#include "windows.h"
