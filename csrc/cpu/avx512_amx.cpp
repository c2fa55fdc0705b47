// The kernels for x86 processors with avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,amx-tile,amx-bf16,avx2,fma; chosen at run time by
// module.cpp.
#include "kernels.h"
#ifdef RETRO_X86
#include <immintrin.h>
RETRO_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,amx-tile,amx-bf16,avx2,fma")
#define RETRO_BUILD avx512_amx
#define RETRO_FLOATS 16
#define RETRO_ROWS 8
#define RETRO_VECTORS 3
#define RETRO_BF16 1
#define RETRO_AMX 1
#include "build.inc"
RETRO_TARGET_END
#endif
