// The kernels for x86 processors with avx2,fma; chosen at run time by module.cpp.
#include "kernels.h"
#ifdef RETRO_X86
#include <immintrin.h>
RETRO_TARGET_BEGIN("avx2,fma")
#define RETRO_BUILD avx2
#define RETRO_FLOATS 8
#define RETRO_ROWS 4
#define RETRO_VECTORS 3
#define RETRO_BF16 0
#include "build.inc"
RETRO_TARGET_END
#endif
