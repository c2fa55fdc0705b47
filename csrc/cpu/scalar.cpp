// The kernels for any processor.
#include "kernels.h"
#define RETRO_BUILD scalar
#define RETRO_FLOATS 4
#define RETRO_ROWS 4
#define RETRO_VECTORS 1
#define RETRO_BF16 0
#include "build.inc"
