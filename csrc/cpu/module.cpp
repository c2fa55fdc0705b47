// retro_kernels._cpu: attention, RoPE, gathering and decoding steps on CPU tensors, given as addresses, sizes and strides (kernels/cpp.py checks
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

// Numbers and addresses one after another, in the order in which kernels/cpp.py writes them.
class Fields {
 public:
  explicit Fields(const std::vector<int64_t>& values) : next_(values.begin()), end_(values.end()) {}
  int64_t integer() {
    if (next_ == end_) throw std::invalid_argument("too few fields");
    return *next_++;
  }
  template <class T>
  T* address() { return reinterpret_cast<T*>(static_cast<uintptr_t>(integer())); }
  Matrix matrix() {
    Matrix m{};
    m.type = Type(integer()), m.bias_type = Type(integer()), m.O = integer(), m.D = integer();
    m.w = address<void>(), m.bias = address<void>(), m.scale = address<float>();
    return m;
  }
  Norm norm(float eps) {
    Norm n{};
    n.D = integer(), n.is_rms = integer() != 0, n.type = Type(integer());
    n.weight = address<void>(), n.bias = address<void>(), n.eps = eps;
    return n;
  }
  Step attention(float scale) {
    Step a{};
    a.B = integer(), a.H = integer(), a.G = integer(), a.E = integer(), a.P = integer(), a.is_interleaved = integer() != 0;
    a.type = Type(integer()), a.row_stride = integer(), a.token_stride = integer(), a.num_keys = integer(), a.num_positions = integer();
    a.keys = address<void>(), a.values = address<void>();
    a.begins = address<int64_t>(), a.starts = address<int64_t>(), a.valid = address<uint8_t>();
    a.positions = address<int64_t>(), a.cos = address<float>(), a.sin = address<float>();
    a.scale = scale;
    for (int64_t b = 0; b < a.B; b++) {
      const int64_t last = a.starts ? a.starts[b] : a.num_keys - 1, first = a.begins ? a.begins[b] : 0;
      if (first < 0 || first > last + 1 || last >= a.num_keys)
        throw py::value_error("row " + std::to_string(b) + " attends " + std::to_string(first) + " ... " + std::to_string(last) + "; the cache holds " + std::to_string(a.num_keys));
      if (a.cos && (a.positions[b] < 0 || a.positions[b] >= a.num_positions))
        throw py::value_error("positions holds " + std::to_string(a.positions[b]) + "; cos has " + std::to_string(a.num_positions) + " positions");
    }
    return a;
  }

 private:
  std::vector<int64_t>::const_iterator next_, end_;
};

// Linear layers on the same input, all outputs of all of them divided among the threads.
void run(const Build& build, const std::vector<Linear>& layers) {
  int64_t outputs = 0;
  for (const Linear& layer : layers) outputs += layer.m.O;
  parallel_for(outputs, 192, [&](int64_t begin, int64_t end) {
    int64_t first = 0;
    for (const Linear& layer : layers) {
      const int64_t from = std::max(begin - first, int64_t(0)), to = std::min(end - first, layer.m.O);
      if (from < to) build.linear(layer, from, to);
      first += layer.m.O;
    }
  });
}

void run(const Build& build, const Step& a) {
  int64_t keys = 1;
  for (int64_t b = 0; b < a.B; b++) keys = std::max(keys, a.starts ? a.starts[b] : a.num_keys);
  const int64_t work = keys * a.E * (a.H / a.G);
  build.put(a, 0, a.B);
  parallel_for(a.B * a.G, std::max<int64_t>(1, 65536 / work), [&](int64_t begin, int64_t end) { build.attend(a, begin, end); });
}

// T, x, y; the matrix.
void linear(const std::string& name, const std::vector<int64_t>& values) {
  Fields fields(values);
  Linear a{};
  a.T = fields.integer(), a.x = fields.address<float>(), a.y = fields.address<float>();
  a.m = fields.matrix();
  const Build& build = find_build(name);
  const py::gil_scoped_release release;
  run(build, {a});
}

// x, y [B, D]; norm; q, k, v, out; attention: y = x + out(attention(q, k, v)), the cache written.
void attention_step(const std::string& name, const std::vector<int64_t>& values, float eps, float scale) {
  Fields fields(values);
  const float* x = fields.address<float>();
  float* y = fields.address<float>();
  const Norm norm = fields.norm(eps);
  const Matrix q = fields.matrix(), k = fields.matrix(), v = fields.matrix(), out = fields.matrix();
  Step a = fields.attention(scale);
  const Build& build = find_build(name);
  const py::gil_scoped_release release;
  std::vector<float> normed(size_t(a.B * norm.D)), queries(size_t(a.B * q.O)), keys(size_t(a.B * k.O)), read(size_t(a.B * q.O));
  std::vector<float> new_values(size_t(a.B * v.O));
  a.q = queries.data(), a.k = keys.data(), a.v = new_values.data(), a.o = read.data();
  build.norm(norm, x, normed.data(), 0, a.B);
  run(build, {{a.B, q, normed.data(), a.q, NONE, nullptr, nullptr}, {a.B, k, normed.data(), a.k, NONE, nullptr, nullptr}, {a.B, v, normed.data(), a.v, NONE, nullptr, nullptr}});
  run(build, a);
  run(build, {{a.B, out, a.o, y, NONE, nullptr, x}});
}

// x, y [B, D]; adds (bool: out's bias also where nothing is read); norm; q, out; attention.
void cross_attention_step(const std::string& name, const std::vector<int64_t>& values, float eps, float scale) {
  Fields fields(values);
  const float* x = fields.address<float>();
  float* y = fields.address<float>();
  const bool adds = fields.integer() != 0;
  const Norm norm = fields.norm(eps);
  const Matrix q = fields.matrix(), out = fields.matrix();
  Step a = fields.attention(scale);
  const Build& build = find_build(name);
  const py::gil_scoped_release release;
  std::vector<float> normed(size_t(a.B * norm.D)), queries(size_t(a.B * q.O)), read(size_t(a.B * q.O));
  a.q = queries.data(), a.o = read.data();
  build.norm(norm, x, normed.data(), 0, a.B);
  run(build, {{a.B, q, normed.data(), a.q, NONE, nullptr, nullptr}});
  run(build, a);
  run(build, {{a.B, out, a.o, y, NONE, nullptr, x}});
  for (int64_t b = 0; !adds && a.valid && b < a.B; ++b) {
    const uint8_t* row = a.valid + b * a.num_keys;
    if (std::find(row, row + a.num_keys, 1) == row + a.num_keys) std::copy(x + b * out.O, x + (b + 1) * out.O, y + b * out.O);
  }
}

// x, y [B, D], B, activation; norm; gate (O = 0: none), up, down: y = x + down(activation(...)).
void feed_forward_step(const std::string& name, const std::vector<int64_t>& values, float eps) {
  Fields fields(values);
  const float* x = fields.address<float>();
  float* y = fields.address<float>();
  const int64_t B = fields.integer();
  const Activation activation = Activation(fields.integer());
  const Norm norm = fields.norm(eps);
  const Matrix gate = fields.matrix(), up = fields.matrix(), down = fields.matrix();
  const Build& build = find_build(name);
  const py::gil_scoped_release release;
  std::vector<float> normed(size_t(B * norm.D)), gates(size_t(B * gate.O)), wide(size_t(B * up.O));
  build.norm(norm, x, normed.data(), 0, B);
  if (gate.O) run(build, {{B, gate, normed.data(), gates.data(), activation, nullptr, nullptr}});
  run(build, {{B, up, normed.data(), wide.data(), gate.O ? NONE : activation, gate.O ? gates.data() : nullptr, nullptr}});
  run(build, {{B, down, wide.data(), y, NONE, nullptr, x}});
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
  m.def("attention_step", &attention_step);
  m.def("cross_attention_step", &cross_attention_step);
  m.def("feed_forward_step", &feed_forward_step);
}
