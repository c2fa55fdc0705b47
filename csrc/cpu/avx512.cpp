// kernels.inc for x86 processors with avx512f,avx512bw,avx512dq,avx512vl,avx2,fma; chosen at run time by module.cpp.
#include "kernels.h"
#ifdef RETRO_X86
#include <immintrin.h>
#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define RETRO_FLOATS 16
#define RETRO_ROWS 8
#define RETRO_VECTORS 3
#define RETRO_BF16 0
namespace retro {
namespace avx512 {
#include "kernels.inc"
}  // namespace avx512
extern const Build avx512_build = {"avx512", avx512::attention_forward, avx512::attention_backward, avx512::rope, avx512::gather_neighbors, avx512::linear, avx512::norm, avx512::put, avx512::attend, avx512::cross_entropy, avx512::apply};
}  // namespace retro
#pragma GCC pop_options
#endif
