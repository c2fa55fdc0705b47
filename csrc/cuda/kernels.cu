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
  int64_t x_b, x_n, x_h, y_b, y_n, y_h, heads;
};

// A thread owns one slot of one head: V pairs, or V features that pass through.
template <class T, int V>
__global__ void rope_kernel(RopeTensor q, RopeTensor k, const float* __restrict__ cos, const float* __restrict__ sin, const int64_t* __restrict__ positions, int64_t position_b,
                            int64_t num_positions, int64_t B, int64_t N, int E, int P, bool is_interleaved, float sign) {
  const int pair_slots = P / V, slots = pair_slots + (E - 2 * P) / V;
  const int64_t heads = q.heads + k.heads, total = B * N * heads * slots;
  for (int64_t item = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; item < total; item += int64_t(gridDim.x) * blockDim.x) {
    const int slot = int(item % slots);
    const int64_t head = item / slots % heads, token = item / slots / heads, b = token / N, n = token % N;
    const RopeTensor& t = head < q.heads ? q : k;
    const int64_t h = head < q.heads ? head : head - q.heads;
    const T* x = static_cast<const T*>(t.x) + b * t.x_b + n * t.x_n + h * t.x_h;
    T* y = static_cast<T*>(t.y) + b * t.y_b + n * t.y_n + h * t.y_h;
    if (slot >= pair_slots) {
      const int e = 2 * P + (slot - pair_slots) * V;
      *reinterpret_cast<Pack<T, V>*>(y + e) = *reinterpret_cast<const Pack<T, V>*>(x + e);
      continue;
    }
    int64_t position = positions ? positions[b * position_b + n] : n;
    position = position < 0 ? 0 : position < num_positions ? position : num_positions - 1;  // nothing outside the table is read
    const float *c = cos + position * P + slot * V, *s = sin + position * P + slot * V;
    if (is_interleaved) {  // V pairs are 2V consecutive features
      const Pack<T, 2 * V> in = *reinterpret_cast<const Pack<T, 2 * V>*>(x + 2 * slot * V);
      Pack<T, 2 * V> out;
      for (int i = 0; i < V; i++) {
        const float u = to_float(in.value[2 * i]), v = to_float(in.value[2 * i + 1]), w = sign * s[i];
        out.value[2 * i] = from_float<T>(u * c[i] - v * w);
        out.value[2 * i + 1] = from_float<T>(v * c[i] + u * w);
      }
      *reinterpret_cast<Pack<T, 2 * V>*>(y + 2 * slot * V) = out;
    } else {
      const Pack<T, V> first = *reinterpret_cast<const Pack<T, V>*>(x + slot * V), second = *reinterpret_cast<const Pack<T, V>*>(x + P + slot * V);
      Pack<T, V> out_first, out_second;
      for (int i = 0; i < V; i++) {
        const float u = to_float(first.value[i]), v = to_float(second.value[i]), w = sign * s[i];
        out_first.value[i] = from_float<T>(u * c[i] - v * w);
        out_second.value[i] = from_float<T>(v * c[i] + u * w);
      }
      *reinterpret_cast<Pack<T, V>*>(y + slot * V) = out_first;
      *reinterpret_cast<Pack<T, V>*>(y + P + slot * V) = out_second;
    }
  }
}

template <class T>
cudaError_t launch_rope(const RopeTensor& q, const RopeTensor& k, const float* cos, const float* sin, const int64_t* positions, int64_t position_b, int64_t num_positions, int64_t B, int64_t N, int E,
                        int P, bool is_interleaved, bool is_inverse, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T) / 2;  // an interleaved slot moves 2V values
  uint64_t misaligned = uint64_t(P) % V | uint64_t(E - 2 * P) % V;
  for (const RopeTensor* t : {&q, &k})
    for (uint64_t value : {uint64_t(t->x) / sizeof(T), uint64_t(t->y) / sizeof(T), uint64_t(t->x_b), uint64_t(t->x_n), uint64_t(t->x_h), uint64_t(t->y_b), uint64_t(t->y_n), uint64_t(t->y_h)})
      misaligned |= value % (2 * V);
  const float sign = is_inverse ? -1.0f : 1.0f;
  const int width = misaligned ? 1 : V;
  const int64_t total = B * N * (q.heads + k.heads) * (P / width + (E - 2 * P) / width);
  if (total == 0) return cudaSuccess;
  const int threads = 256, blocks = int(total / threads + 1 < 1 << 20 ? total / threads + 1 : 1 << 20);
  if (misaligned)
    rope_kernel<T, 1><<<blocks, threads, 0, stream>>>(q, k, cos, sin, positions, position_b, num_positions, B, N, E, P, is_interleaved, sign);
  else
    rope_kernel<T, V><<<blocks, threads, 0, stream>>>(q, k, cos, sin, positions, position_b, num_positions, B, N, E, P, is_interleaved, sign);
  return cudaGetLastError();
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
  const RopeTensor a{q, q_out, s[0], s[1], s[2], s[3], s[4], s[5], q_heads}, b{k, k_out, s[6], s[7], s[8], s[9], s[10], s[11], k_heads};
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
