// retro_kernels._cpu: attention, RoPE and gathering on CPU tensors, given as addresses, sizes and strides (kernels/cpp.py checks
// them). No torch header: the module builds anywhere and works with any torch. Threads are torch's own: the address
// of libtorch's torch_parallel_for is handed over at import; without it everything runs on the calling thread.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"

namespace py = pybind11;
using namespace retro;

namespace {

typedef int32_t (*ParallelFor)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);
ParallelFor parallel_for_address = nullptr;

// work(begin, end) over [0, count), at least `grain` items a thread.
void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& work) {
  auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const std::function<void(int64_t, int64_t)>*>(context))(begin, end);
  };
  void* context = const_cast<void*>(static_cast<const void*>(&work));
  if (parallel_for_address == nullptr || count <= grain) return work(0, count);
  if (parallel_for_address(0, count, grain, call, context) != 0) throw std::runtime_error("torch_parallel_for failed");
}

std::vector<const Build*> supported_builds() {
  std::vector<const Build*> builds;
#ifdef RETRO_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) builds.push_back(&avx512_bf16_build);
  if (avx512) builds.push_back(&avx512_build);
  if (avx2) builds.push_back(&avx2_build);
#endif
  builds.push_back(&scalar_build);
  return builds;
}

const Build& find_build(const std::string& name) {
  for (const Build* build : supported_builds())
    if (name == build->name) return *build;
  throw std::invalid_argument("this processor has no " + name);
}

template <class T>
T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

// sizes: B L KV G E N num_queries query_step query_first K R P query_offset query_period is_causal.
// strides: q 3, o 3, k 5, v 5, gradients of k and v 5.
// addresses: q k v o lse lengths begins first_keys cos sin; backward also grad_o grad_q grad_k grad_v.
Attention make_attention(const std::array<int64_t, 15>& sizes, float scale, const std::array<int64_t, 21>& strides, const std::vector<uintptr_t>& addresses) {
  Attention a{};
  int64_t* fields[] = {&a.B, &a.L, &a.KV, &a.G, &a.E, &a.N, &a.num_queries, &a.query_step, &a.query_first, &a.K, &a.R, &a.P, &a.query_offset, &a.query_period};
  for (int i = 0; i < 14; i++) *fields[i] = sizes[size_t(i)];
  a.is_causal = sizes[14] != 0;
  a.scale = scale;
  auto from = strides.begin();
  for (auto [to, count] : {std::pair{a.q_strides, 3}, {a.o_strides, 3}, {a.k_strides, 5}, {a.v_strides, 5}, {a.grad_kv_strides, 5}}) {
    std::copy(from, from + count, to);
    from += count;
  }
  a.q = pointer<void>(addresses[0]);
  a.k = pointer<void>(addresses[1]);
  a.v = pointer<void>(addresses[2]);
  a.o = pointer<void>(addresses[3]);
  a.lse = pointer<float>(addresses[4]);
  a.lengths = pointer<int64_t>(addresses[5]);
  a.begins = pointer<int64_t>(addresses[6]);
  a.first_keys = pointer<int64_t>(addresses[7]);
  a.cos = pointer<float>(addresses[8]);
  a.sin = pointer<float>(addresses[9]);
  if (addresses.size() > 10) {
    a.grad_o = pointer<void>(addresses[10]);
    a.grad_q = pointer<void>(addresses[11]);
    a.grad_k = pointer<void>(addresses[12]);
    a.grad_v = pointer<void>(addresses[13]);
  }
  return a;
}

void attention(const std::string& build, int type, const std::array<int64_t, 15>& sizes, float scale, const std::array<int64_t, 21>& strides, const std::vector<uintptr_t>& addresses) {
  const Attention a = make_attention(sizes, scale, strides, addresses);
  const bool is_backward = addresses.size() > 10;
  const auto run = is_backward ? find_build(build).attention_backward : find_build(build).attention_forward;
  const py::gil_scoped_release release;
  parallel_for(a.B * a.L * a.KV, 1, [&](int64_t begin, int64_t end) { run(a, Type(type), begin, end); });
}

// sizes: B N H E P num_positions position_stride is_interleaved is_inverse; strides: x 3, y 3; addresses: x y cos sin positions.
void rope(const std::string& build, int type, const std::array<int64_t, 9>& sizes, const std::array<int64_t, 6>& strides, const std::array<uintptr_t, 5>& addresses) {
  Rope a{};
  a.B = sizes[0], a.N = sizes[1], a.H = sizes[2], a.E = sizes[3], a.P = sizes[4], a.num_positions = sizes[5];
  a.position_stride = sizes[6], a.is_interleaved = sizes[7] != 0, a.is_inverse = sizes[8] != 0;
  std::copy(strides.begin(), strides.begin() + 3, a.x_strides);
  std::copy(strides.begin() + 3, strides.end(), a.y_strides);
  a.x = pointer<void>(addresses[0]);
  a.y = pointer<void>(addresses[1]);
  a.cos = pointer<float>(addresses[2]);
  a.sin = pointer<float>(addresses[3]);
  a.positions = pointer<int64_t>(addresses[4]);
  if (a.positions) {
    const int64_t count = a.position_stride ? a.B * a.N : a.N;
    for (int64_t i = 0; i < count; i++)
      if (a.positions[i] < 0 || a.positions[i] >= a.num_positions)
        throw py::value_error("positions holds " + std::to_string(a.positions[i]) + "; cos has " + std::to_string(a.num_positions) + " positions");
  }
  const auto run = find_build(build).rope;
  const py::gil_scoped_release release;
  parallel_for(a.B * a.N, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, a.H * a.E)), [&](int64_t begin, int64_t end) { run(a, Type(type), begin, end); });
}

// sizes: item count rows M R pad; addresses: table document row_lengths ids tokens lengths.
void gather_neighbors(const std::string& build, const std::array<int64_t, 6>& sizes, const std::array<uintptr_t, 6>& addresses) {
  Gather a{};
  a.item = sizes[0], a.count = sizes[1], a.rows = sizes[2], a.M = sizes[3], a.R = sizes[4], a.pad = sizes[5];
  a.table = pointer<void>(addresses[0]);
  a.document = pointer<int32_t>(addresses[1]);
  a.row_lengths = pointer<int32_t>(addresses[2]);
  a.ids = pointer<int64_t>(addresses[3]);
  a.tokens = pointer<void>(addresses[4]);
  a.lengths = pointer<int64_t>(addresses[5]);
  const auto run = find_build(build).gather_neighbors;
  const py::gil_scoped_release release;
  parallel_for(a.count, 512, [&](int64_t begin, int64_t end) { run(a, begin, end); });
}

// sizes: T O D; addresses: x w scale bias y.
void linear(const std::string& build, int type, const std::array<int64_t, 3>& sizes, const std::array<uintptr_t, 5>& addresses) {
  Linear a{};
  a.T = sizes[0], a.O = sizes[1], a.D = sizes[2], a.type = Type(type);
  a.x = pointer<float>(addresses[0]);
  a.w = pointer<void>(addresses[1]);
  a.scale = pointer<float>(addresses[2]);
  a.bias = pointer<float>(addresses[3]);
  a.y = pointer<float>(addresses[4]);
  const auto run = find_build(build).linear;
  const py::gil_scoped_release release;
  parallel_for(a.O, 192, [&](int64_t begin, int64_t end) { run(a, begin, end); });
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.def("builds", [] {
    std::vector<std::string> names;
    for (const Build* build : supported_builds()) names.push_back(build->name);
    return names;
  }, "The instruction sets that this processor has, best first.");
  m.def("set_parallel_for", [](uintptr_t address) { parallel_for_address = reinterpret_cast<ParallelFor>(address); });
  m.def("attention", &attention);
  m.def("rope", &rope);
  m.def("gather_neighbors", &gather_neighbors);
  m.def("linear", &linear);
}
