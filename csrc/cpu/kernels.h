// What the module and the instruction-set builds share: the arguments of each kernel and the table of builds.
// Lengths and strides in elements, int64; letters as in kernels/reference.py.
#pragma once
#include <algorithm>  // here, before a build's target is set: what it emits of the library must run on any processor
#include <atomic>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "../compiler.h"

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
  int32_t drop_below;                     // weights are dropped where 24 bits of their hash are below it; 0 = none
  uint32_t seed_low, seed_high;           // of the hash
  float keep;                             // 1 / (1 - dropout)
  int64_t parts;                          // forward: items that share a problem's tiles of queries
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

// TYPE_...: blocks of 32 or 256 weights (blocks.inc), ggml's number and 16.
enum Type : int {
  FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2,
  TYPE_Q4_0 = 18, TYPE_Q4_1 = 19, TYPE_Q5_0 = 22, TYPE_Q5_1 = 23, TYPE_Q8_0 = 24, TYPE_Q4_K = 28, TYPE_Q5_K = 29, TYPE_Q6_K = 30
};

// Weights of a linear layer: y = scale x w' + bias.
struct Matrix {
  Type type, bias_type;                   // of w; of the bias
  const void *w, *bias;                   // [O, D], or of each of O rows the blocks that hold D; [O] or null
  const float* scale;                     // [O] or null
  int64_t O, D;
};

enum Activation : int { NONE = 0, GELU = 1, GELU_TANH = 2, SILU = 3 };

// The functions that the kernels compute themselves, beside the activations: for tests over all of float32.
enum Primitive : int { EXP2 = 4, ERF = 5, SIGMOID = 6, ROUNDED = 7 };

// y = activation(x w') * factor + residual for a few rows of x, as a step of decoding has: what counts is to read w once.
struct Linear {
  int64_t T;
  Matrix m;
  const float* x;                         // [T, D]
  float* y;                               // [T, O]
  Activation activation;
  const float *factor, *residual;         // [T, O] or null
  uint64_t ticket;                        // of x: under one number a thread finds the same inputs; 0 = it must not assume so
};

// LayerNorm, or RMSNorm without a mean and a bias.
struct Norm {
  int64_t D;
  bool is_rms;
  Type type;                              // of weight and bias
  const void *weight, *bias;              // [D] or null
  float eps;
};

// Attention of one new token a row: its keys and values are put into the cache, then it attends.
struct Step {
  int64_t B, H, G, E, P;
  float *q, *k, *v;                       // [B, H, E], [B, G, E]; k null = nothing new
  float* o;                               // [B, H, E]; 0 where nothing is attended
  Type type;                              // of the cache
  void *keys, *values;                    // [num_rows, S, G, E]
  int64_t row_stride, token_stride, head_stride;  // of both
  int64_t num_keys;                       // S
  const int64_t *begins, *starts;         // [B] first key and last key, where the new token is put; null: 0, S - 1
  const uint8_t* valid;                   // [B, num_keys] or null
  const int64_t* rows;                    // [B] of the cache; null: each its own
  int64_t num_rows;
  const int64_t* positions;               // [B] of q (and k) in cos and sin
  const float *cos, *sin;                 // [num_positions, P] or null
  int64_t num_positions;
  bool is_interleaved;
  float scale;
  int64_t splits;                         // pieces of KEYS_AT_ONCE keys of the row that has most
  float* reads;                           // [B, G, splits, H / G, E + 2]
  std::atomic<int32_t>* left;             // [B, G] pieces that are not done yet; the last one joins them
  int64_t row(int64_t b) const { return rows ? rows[b] : b; }
};
constexpr int64_t KEYS_AT_ONCE = 256;

// Each row's -log softmax(logits)[label]; the gradient of their sum may take the logits' place.
struct CrossEntropy {
  int64_t V;
  void* logits;                           // [T, V]
  const int64_t* labels;                  // [T], 0 ... V - 1
  float* losses;                          // [T]
  bool has_gradient;
};

// One instruction set's build. Each function handles problems [begin, end) of its kernel.
struct Build {
  const char* name;
  void (*attention_forward)(const Attention&, Type, int64_t begin, int64_t end);
  void (*attention_backward)(const Attention&, Type, int64_t begin, int64_t end);
  void (*rope)(const Rope&, Type, int64_t begin, int64_t end);  // items are b * N + n
  void (*gather_neighbors)(const Gather&, int64_t begin, int64_t end);
  void (*linear)(const Linear&, int64_t begin, int64_t end);  // items are outputs
  void (*many_rows)(const Linear&, int64_t begin, int64_t end);  // items are outputs, in multiples of 32 and the last ones; null where there is no matrix unit
  void (*to_blocks)(Type, const float* x, uint8_t* out, int64_t begin, int64_t end);  // items are blocks
  void (*norm)(const Norm&, Type, const void* x, void* y, int64_t begin, int64_t end);  // items are rows
  void (*widen)(const int8_t*, const float* scale, void* y, int64_t D, int64_t begin, int64_t end);  // items are rows
  void (*swiglu)(Type, const void* gate, const void* up, void* y, int64_t begin, int64_t end);  // items are numbers
  void (*put)(const Step&, int64_t begin, int64_t end);       // rotates, and writes the cache; items are rows
  void (*attend)(const Step&, int64_t begin, int64_t end);    // items are (b * splits + a piece of its keys) * G + g: heads whose keys lie beside each other follow one another
  void (*cross_entropy)(const CrossEntropy&, Type, int64_t begin, int64_t end);  // items are rows
  void (*apply)(Primitive, const float* x, float* y, int64_t count);  // an Activation's number too
};

extern const Build scalar_build;
#ifdef RETRO_X86
extern const Build avx2_build, avx512_build, avx512_bf16_build, avx512_amx_build;
#endif

}  // namespace retro
