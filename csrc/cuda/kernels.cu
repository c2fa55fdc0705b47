// RoPE and neighbor gathering for NVIDIA GPUs, behind a C interface (kernels/cuda.py): addresses, sizes, a stream.
// No torch header: one library serves any torch. Every function returns a cudaError_t and launches on the given
// stream without synchronising. Inputs are never overwritten. Strides in elements, of the last axis always 1.
// RoPE reads x once and writes y once; gathering reads ceil(r/m) rows and writes r tokens per id: these copies are
// their rooflines. The table may be device memory or host memory registered with retro_register_host.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

template <class T> __device__ float to_float(T x) { return float(x); }
template <class T> __device__ T from_float(float x) { return T(x); }

// V consecutive values, moved in one access where 16 bytes are aligned.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack { T value[V]; };

struct RopeTensor {
  const void* x;
  void* y;
  int64_t x_b, x_n, x_h, y_b, y_n, y_h;
  int heads;
};

// The two packs of a thread's slot in one head: the members of V pairs, first and second, or V pairs side by side.
template <class T, int V, bool INTERLEAVED>
__device__ __forceinline__ void rotate(Pack<T, V>& first, Pack<T, V>& second, const float* c, const float* s) {
#pragma unroll
  for (int i = 0; i < V; i++) {
    T& a = INTERLEAVED ? (2 * i < V ? first.value[2 * i % V] : second.value[2 * i % V]) : first.value[i];
    T& b = INTERLEAVED ? (2 * i + 1 < V ? first.value[(2 * i + 1) % V] : second.value[(2 * i + 1) % V]) : second.value[i];
    const float u = to_float(a), v = to_float(b);
    a = from_float<T>(u * c[i] - v * s[i]);
    b = from_float<T>(v * c[i] + u * s[i]);
  }
}

// Heads begin ... end of one token's slot; `gap` values lie between its two packs, and where it has only one, 0. What AHEAD heads
// need is asked for before any of it is used.
template <class T, int V, bool INTERLEAVED>
__device__ __forceinline__ void rotate_heads(const RopeTensor& t, int64_t b, int n, int begin, int end, int at, int gap, const float* c, const float* s) {
  constexpr int AHEAD = 4;
  using Values = Pack<T, V>;
  const T* __restrict__ x = static_cast<const T*>(t.x) + b * t.x_b + n * t.x_n + begin * t.x_h + at;
  T* __restrict__ y = static_cast<T*>(t.y) + b * t.y_b + n * t.y_n + begin * t.y_h + at;
  for (int h = begin; h < end; h += AHEAD, x += AHEAD * t.x_h, y += AHEAD * t.y_h) {
    Values first[AHEAD], second[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
      if (h + i < end) {
        first[i] = *reinterpret_cast<const Values*>(x + i * t.x_h);
        if (gap) second[i] = *reinterpret_cast<const Values*>(x + i * t.x_h + gap);
      }
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
      if (h + i < end) {
        if (gap) {
          rotate<T, V, INTERLEAVED>(first[i], second[i], c, s);
          *reinterpret_cast<Values*>(y + i * t.y_h + gap) = second[i];
        }
        *reinterpret_cast<Values*>(y + i * t.y_h) = first[i];
      }
  }
}

// A thread owns one slot of one token (V pairs, or V features that pass through) in `heads_a_thread` heads of q, then k: its cosines,
// sines and place are read and reckoned once for all of them. Grid: tokens x slots, batch, groups of heads. One block a multiprocessor may
// be all: with no such promise ptxas spills to keep three.
template <class T, int V, bool INTERLEAVED>
__global__ void __launch_bounds__(256, 1) rope_kernel(RopeTensor q, RopeTensor k, const float* __restrict__ cos, const float* __restrict__ sin, const int64_t* __restrict__ positions, int64_t position_b,
                                                   int64_t num_positions, int B, int N, int E, int P, int heads_a_thread, float sign) {
  const unsigned slots = (E - P) / V, place = blockIdx.x * 256 + threadIdx.x;
  const int n = place / slots, slot = place % slots, pairs = slot * V;
  if (n >= N) return;
  const int begin = blockIdx.z * heads_a_thread, end = min(begin + heads_a_thread, q.heads + k.heads);
  const bool turns = pairs < P;
  const int at = turns ? (INTERLEAVED ? 2 * pairs : pairs) : P + pairs, gap = turns ? (INTERLEAVED ? V : P) : 0;
  for (int b = blockIdx.y; b < B; b += gridDim.y) {
    float c[V], s[V];
    if (turns) {
      int64_t position = positions ? positions[b * position_b + n] : n;
      position = position < 0 ? 0 : position < num_positions ? position : num_positions - 1;  // nothing outside the table is read
      constexpr int F = V < 4 ? V : 4;
#pragma unroll
      for (int i = 0; i < V; i += F) {
        const auto cosines = *reinterpret_cast<const Pack<float, F>*>(cos + position * P + pairs + i), sines = *reinterpret_cast<const Pack<float, F>*>(sin + position * P + pairs + i);
#pragma unroll
        for (int f = 0; f < F; f++) c[i + f] = cosines.value[f], s[i + f] = sign * sines.value[f];
      }
    }
    rotate_heads<T, V, INTERLEAVED>(q, b, n, begin, min(end, q.heads), at, gap, c, s);
    rotate_heads<T, V, INTERLEAVED>(k, b, n, max(begin - q.heads, 0), end - q.heads, at, gap, c, s);
  }
}

template <class T, int V, bool INTERLEAVED>
cudaError_t launch_rope_of(const RopeTensor& q, const RopeTensor& k, const float* cos, const float* sin, const int64_t* positions, int64_t position_b, int64_t num_positions, int64_t B, int64_t N, int E,
                           int P, float sign, cudaStream_t stream) {
  const int64_t places = N * ((E - P) / V), heads = q.heads + k.heads;
  if (places == 0 || B == 0 || heads == 0) return cudaSuccess;
  if (places > INT32_MAX - 256 || B > INT32_MAX) return cudaErrorInvalidValue;
  const int64_t enough = 1 << 18;  // threads: as many as the largest GPUs hold at once
  int64_t groups = (enough + places * B - 1) / (places * B);  // of at least four heads
  groups = groups < (heads + 3) / 4 ? groups : (heads + 3) / 4;
  const int heads_a_thread = int((heads + groups - 1) / groups);
  const dim3 grid(unsigned((places + 255) / 256), unsigned(B < 65535 ? B : 65535), unsigned((heads + heads_a_thread - 1) / heads_a_thread));
  rope_kernel<T, V, INTERLEAVED><<<grid, 256, 0, stream>>>(q, k, cos, sin, positions, position_b, num_positions, int(B), int(N), E, P, heads_a_thread, sign);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_rope(const RopeTensor& q, const RopeTensor& k, const float* cos, const float* sin, const int64_t* positions, int64_t position_b, int64_t num_positions, int64_t B, int64_t N, int E,
                        int P, bool is_interleaved, bool is_inverse, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  uint64_t misaligned = uint64_t(P) % V | uint64_t(E - 2 * P) % V | uint64_t(cos) % 16 | uint64_t(sin) % 16;
  for (const RopeTensor* t : {&q, &k})
    for (uint64_t value : {uint64_t(t->x) / sizeof(T), uint64_t(t->y) / sizeof(T), uint64_t(t->x_b), uint64_t(t->x_n), uint64_t(t->x_h), uint64_t(t->y_b), uint64_t(t->y_n), uint64_t(t->y_h)})
      misaligned |= value % V;
  const float sign = is_inverse ? -1.0f : 1.0f;
  const auto launch = is_interleaved ? (misaligned ? launch_rope_of<T, 1, true> : launch_rope_of<T, V, true>) : (misaligned ? launch_rope_of<T, 1, false> : launch_rope_of<T, V, false>);
  return launch(q, k, cos, sin, positions, position_b, num_positions, B, N, E, P, sign, stream);
}

// A warp owns one id. An id outside the table gives length 0, so that no memory outside it is read.
template <class T, class O>
__global__ void gather_kernel(const T* __restrict__ table, const int32_t* __restrict__ document, const int32_t* __restrict__ row_lengths, const int64_t* __restrict__ ids, O* __restrict__ tokens,
                              int64_t* __restrict__ lengths, int64_t count, int64_t rows, int M, int R, O pad) {
  const int lane = threadIdx.x % 32;
  const int64_t number = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) / 32;
  if (number >= count) return;
  const int64_t row = ids[number];
  O* out = tokens + number * R;
  int done = 0;
  if (row >= 0 && row < rows) {
    const int32_t its_document = document[row];
    for (int64_t at = row; done < R && at < rows && document[at] == its_document; at++) {
      const int stated = row_lengths[at], valid = stated < 0 ? 0 : stated < M ? stated : M, take = valid < R - done ? valid : R - done;
      for (int i = lane; i < take; i += 32) out[done + i] = O(table[at * M + i]);
      done += take;
      if (valid < M) break;
    }
  }
  for (int i = done + lane; i < R; i += 32) out[i] = pad;
  if (lane == 0) lengths[number] = done;
}

template <class T, class O>
cudaError_t launch_gather(const void* table, const int32_t* document, const int32_t* row_lengths, const int64_t* ids, void* tokens, int64_t* lengths, int64_t count, int64_t rows, int M, int R,
                          int64_t pad, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const int64_t blocks = (count * 32 + 255) / 256;
  gather_kernel<T, O><<<unsigned(blocks), 256, 0, stream>>>(static_cast<const T*>(table), document, row_lengths, ids, static_cast<O*>(tokens), lengths, count, rows, M, R, O(pad));
  return cudaGetLastError();
}

}  // namespace

extern "C" {

// type: 0 float, 1 bfloat16, 2 half. strides: q x 3, q y 3, k x 3, k y 3.
int retro_rope(int type, const void* q, void* q_out, const void* k, void* k_out, const float* cos, const float* sin, const int64_t* positions, int64_t position_b, int64_t num_positions, const int64_t* strides,
               int64_t B, int64_t N, int64_t q_heads, int64_t k_heads, int64_t E, int64_t P, int is_interleaved, int is_inverse, void* stream) {
  const int64_t* s = strides;
  const RopeTensor a{q, q_out, s[0], s[1], s[2], s[3], s[4], s[5], int(q_heads)}, b{k, k_out, s[6], s[7], s[8], s[9], s[10], s[11], int(k_heads)};
  const auto st = static_cast<cudaStream_t>(stream);
  const bool interleaved = is_interleaved != 0, inverse = is_inverse != 0;
  switch (type) {
    case 0: return launch_rope<float>(a, b, cos, sin, positions, position_b, num_positions, B, N, int(E), int(P), interleaved, inverse, st);
    case 1: return launch_rope<__nv_bfloat16>(a, b, cos, sin, positions, position_b, num_positions, B, N, int(E), int(P), interleaved, inverse, st);
    case 2: return launch_rope<__half>(a, b, cos, sin, positions, position_b, num_positions, B, N, int(E), int(P), interleaved, inverse, st);
  }
  return cudaErrorInvalidValue;
}

// item: 2 (uint16 -> int64), 4 (int32 -> int32), 8 (int64 -> int64). The table may be registered host memory.
int retro_gather_neighbors(int item, const void* table, int is_host, const int32_t* document, const int32_t* row_lengths, const int64_t* ids, void* tokens, int64_t* lengths, int64_t count,
                           int64_t rows, int64_t M, int64_t R, int64_t pad, void* stream) {
  if (is_host) {
    void* mapped = nullptr;
    const cudaError_t error = cudaHostGetDevicePointer(&mapped, const_cast<void*>(table), 0);
    if (error != cudaSuccess) return cudaGetLastError();  // and clear it
    table = mapped;
  }
  const auto st = static_cast<cudaStream_t>(stream);
  switch (item) {
    case 2: return launch_gather<uint16_t, int64_t>(table, document, row_lengths, ids, tokens, lengths, count, rows, int(M), int(R), pad, st);
    case 4: return launch_gather<int32_t, int32_t>(table, document, row_lengths, ids, tokens, lengths, count, rows, int(M), int(R), pad, st);
    case 8: return launch_gather<int64_t, int64_t>(table, document, row_lengths, ids, tokens, lengths, count, rows, int(M), int(R), pad, st);
  }
  return cudaErrorInvalidValue;
}

// Host memory that the GPU reads in place; the caller keeps it alive until it is unregistered.
int retro_register_host(void* address, int64_t bytes) {
  if (cudaHostRegister(address, size_t(bytes), cudaHostRegisterMapped | cudaHostRegisterReadOnly) == cudaSuccess) return cudaSuccess;
  cudaGetLastError();  // not every device takes the flag
  cudaHostRegister(address, size_t(bytes), cudaHostRegisterMapped);
  return cudaGetLastError();
}
int retro_unregister_host(void* address) {
  cudaHostUnregister(address);
  return cudaGetLastError();
}
// Whether this library's CUDA runtime works with the driver.
int retro_probe() {
  int count = 0;
  cudaGetDeviceCount(&count);
  return cudaGetLastError();
}
const char* retro_error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }

}  // extern "C"
