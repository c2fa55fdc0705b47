// kernels.inc for x86 processors with avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma; chosen at run time by module.cpp.
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
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#define RETRO_FLOATS 16
#define RETRO_ROWS 8
#define RETRO_VECTORS 3
#define RETRO_BF16 1
namespace retro {
namespace avx512_bf16 {
#include "kernels.inc"
}  // namespace avx512_bf16
extern const Build avx512_bf16_build = {"avx512_bf16", avx512_bf16::attention_forward, avx512_bf16::attention_backward, avx512_bf16::rope, avx512_bf16::gather_neighbors, avx512_bf16::linear, avx512_bf16::norm, avx512_bf16::put, avx512_bf16::attend, avx512_bf16::cross_entropy, avx512_bf16::apply};
}  // namespace retro
#pragma GCC pop_options
#endif
