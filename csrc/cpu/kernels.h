// What the module and the instruction-set builds share: the arguments of each kernel and the table of builds.
// Lengths and strides in elements, int64; letters as in kernels/reference.py.
#pragma once
#include <cstdint>

namespace retro {

// One attention problem is (b, u, g): batch, chunk, key/value head. Its queries are G heads of `num_queries` tokens
// u * query_step + query_first + i, its keys the valid tokens of K segments of R. All strides of the last axis are 1.
struct Attention {
  int64_t B, L, KV, G, E;                 // problems are B x L x KV
  int64_t N, num_queries, query_step, query_first;
  int64_t K, R;                           // segments and keys of each
  int64_t q_strides[3], o_strides[3];     // b, token, head (o: also grad_o and grad_q)
  int64_t k_strides[5], v_strides[5];     // b, chunk, segment, token, head
  int64_t grad_kv_strides[5];             // of both gradients
  const void *q, *k, *v;
  void* o;
  float* lse;                             // [B, KV * G, N], log2 units; +inf where nothing is attended
  const int64_t* lengths;                 // [B, L, K] valid keys of each segment, or null = R
  const int64_t* begins;                  // [B, L, K] keys before it are masked, or null = 0
  const int64_t* first_keys;              // [B, N] keys before it are masked for that query, or null = 0
  bool is_causal;                         // key s of segment 0 is seen by queries i >= s - (R - num_queries)
  const float *cos, *sin;                 // [positions, P], or null
  int64_t P, query_offset, query_period;  // query i is at query_offset + i % query_period, key s at s
  float scale;
  // backward only
  const void* grad_o;
  void *grad_q, *grad_k, *grad_v;
};

struct Rope {
  int64_t B, N, H, E, P;
  int64_t x_strides[3], y_strides[3];     // b, token, head
  const void* x;
  void* y;
  const float *cos, *sin;                 // [positions, P]
  int64_t num_positions;
  const int64_t* positions;               // [N] or [B, N], or null
  int64_t position_stride;                // 0 for [N]
  bool is_interleaved, is_inverse;
};

struct Gather {
  int64_t item, count, rows, M, R, pad;   // item: bytes of a token: 2 (uint16 -> int64), 4, 8 (as they are)
  const void* table;                      // [rows, M]
  const int32_t *document, *row_lengths;  // [rows]
  const int64_t* ids;                     // [count]
  void* tokens;                           // [count, R]
  int64_t* lengths;                       // [count]
};

enum Type : int { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

// y = scale x w' + bias for a few rows of x, as a step of decoding has: what counts is to read w once.
struct Linear {
  int64_t T, O, D;
  Type type;                              // of w
  const void* w;                          // [O, D]
  const float *x, *scale, *bias;          // [T, D], [O] or null, [O] or null
  float* y;                               // [T, O]
};

// One instruction set's build. Each function handles problems [begin, end) of its kernel.
struct Build {
  const char* name;
  void (*attention_forward)(const Attention&, Type, int64_t begin, int64_t end);
  void (*attention_backward)(const Attention&, Type, int64_t begin, int64_t end);
  void (*rope)(const Rope&, Type, int64_t begin, int64_t end);  // items are b * N + n
  void (*gather_neighbors)(const Gather&, int64_t begin, int64_t end);
  void (*linear)(const Linear&, int64_t begin, int64_t end);  // items are outputs
};

extern const Build scalar_build;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RETRO_X86 1
extern const Build avx2_build, avx512_build, avx512_bf16_build;
#endif

}  // namespace retro
