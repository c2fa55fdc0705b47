// kernels.inc for x86 processors with avx2,fma; chosen at run time by module.cpp.
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
#pragma GCC target("avx2,fma")
#define RETRO_FLOATS 8
#define RETRO_ROWS 4
#define RETRO_VECTORS 3
#define RETRO_BF16 0
namespace retro {
namespace avx2 {
#include "kernels.inc"
}  // namespace avx2
extern const Build avx2_build = {"avx2", avx2::attention_forward, avx2::attention_backward, avx2::rope, avx2::gather_neighbors, avx2::linear, avx2::norm, avx2::put, avx2::attend, avx2::cross_entropy, avx2::apply};
}  // namespace retro
#pragma GCC pop_options
#endif
