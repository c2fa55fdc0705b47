// retro_kernels._cpu: attention, RoPE, gathering, cross-entropy and decoding steps on CPU tensors. Every function takes a build's
// name and a kernel's fields, numbers and tensors, in the one order in which it reads them (kernels/cpp.py checks and writes them). No torch header: the module builds anywhere and works with any torch. Threads are torch's own: the address of
// libtorch's torch_parallel_for is handed over at import; without it everything runs on the calling thread.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <functional>
#include <string>
#include <vector>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"
#ifdef RETRO_X86
#include <cpuid.h>
#endif

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

#ifdef RETRO_X86
// Whether there is a matrix unit for bf16 (CPUID leaf 7: AMX-BF16, AMX-TILE) whose registers the system gives to this process.
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
#ifdef __linux__
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // of arch_prctl(2)
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
  return false;
#endif
}
#endif

std::vector<const Build*> supported_builds() {
  std::vector<const Build*> builds;
#ifdef RETRO_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  static const bool amx = bf16 && has_amx();
  if (amx) builds.push_back(&avx512_amx_build);
  if (bf16) builds.push_back(&avx512_bf16_build);
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

void check_position(int64_t position, int64_t num_positions) {
  if (position < 0 || position >= num_positions)
    throw py::value_error("positions holds " + std::to_string(position) + "; cos has " + std::to_string(num_positions) + " positions");
}

// Reads a kernel's fields, all of them, in the order in which they are written here: a number, a flag, a tensor (None = no address).
class Fields {
 public:
  explicit Fields(const py::tuple& fields) : fields_(fields) {}
  template <class... Values>
  void read(Values&... values) { (take(values), ...); }
  void end() const {
    if (at_ != fields_.size()) throw std::invalid_argument("too many fields");
  }

 private:
  PyObject* next() {
    if (at_ == fields_.size()) throw std::invalid_argument("too few fields");
    return PyTuple_GET_ITEM(fields_.ptr(), Py_ssize_t(at_++));
  }
  static int64_t integer(PyObject* x) {
    const int64_t value = PyLong_AsLongLong(x);
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  template <class T>
  void take(T& x) { x = T(integer(next())); }  // also a flag or a type
  template <class T>
  void take(T*& x) {
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    PyObject* const tensor = next();
    x = nullptr;
    if (tensor == Py_None) return;
    const auto address = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, data_ptr));
    if (!address) throw py::error_already_set();
    x = reinterpret_cast<T*>(static_cast<uintptr_t>(integer(address.ptr())));
  }
  template <size_t count>
  void take(int64_t (&strides)[count]) { for (int64_t& x : strides) take(x); }
  void take(float& x) {
    const double value = PyFloat_AsDouble(next());
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    x = float(value);
  }
  void take(Matrix& m) { read(m.type, m.bias_type, m.O, m.D, m.w, m.bias, m.scale); }
  void take(Norm& n) { read(n.D, n.is_rms, n.type, n.weight, n.bias, n.eps); }
  void take(Step& a) {
    read(a.B, a.H, a.G, a.E, a.P, a.type, a.keys, a.values, a.row_stride, a.token_stride, a.head_stride, a.num_keys);
    read(a.begins, a.starts, a.valid, a.positions, a.cos, a.sin, a.num_positions, a.is_interleaved, a.scale);
  }

  const py::tuple& fields_;
  size_t at_ = 0;
};
template <class... Values>
void read_all(const py::tuple& from, Values&... values) {
  Fields fields(from);
  fields.read(values...);
  fields.end();
}

void attention(const std::string& build, const py::args& given) {
  Type type;
  Attention a{};
  Fields fields(given);
  fields.read(type, a.B, a.L, a.KV, a.G, a.E, a.N, a.num_queries, a.query_step, a.query_first, a.K, a.R);
  fields.read(a.q_strides, a.o_strides, a.k_strides, a.v_strides, a.grad_kv_strides, a.q, a.k, a.v, a.o, a.lse);
  fields.read(a.lengths, a.begins, a.first_keys, a.is_causal, a.cos, a.sin, a.P, a.query_offset, a.query_period, a.scale);
  fields.read(a.drop_below, a.seed_low, a.seed_high, a.keep, a.parts, a.grad_o, a.grad_q, a.grad_k, a.grad_v);
  fields.end();
  const auto run = a.grad_o ? find_build(build).attention_backward : find_build(build).attention_forward;
  const py::gil_scoped_release release;
  parallel_for(a.B * a.L * a.KV * (a.grad_o ? 1 : a.parts), 1, [&](int64_t begin, int64_t end) { run(a, type, begin, end); });
}

void rope(const std::string& build, const py::args& given) {
  Type type;
  Rope a{};
  read_all(given, type, a.B, a.N, a.H, a.E, a.P, a.x_strides, a.y_strides, a.x, a.y, a.cos, a.sin, a.num_positions, a.positions, a.position_stride, a.is_interleaved, a.is_inverse);
  if (a.positions) {
    const int64_t count = a.position_stride ? a.B * a.N : a.N;
    for (int64_t i = 0; i < count; i++) check_position(a.positions[i], a.num_positions);
  }
  const auto run = find_build(build).rope;
  const py::gil_scoped_release release;
  parallel_for(a.B * a.N, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, a.H * a.E)), [&](int64_t begin, int64_t end) { run(a, type, begin, end); });
}

void gather_neighbors(const std::string& build, const py::args& given) {
  Gather a{};
  read_all(given, a.item, a.count, a.rows, a.M, a.R, a.pad, a.table, a.document, a.row_lengths, a.ids, a.tokens, a.lengths);
  const auto run = find_build(build).gather_neighbors;
  const py::gil_scoped_release release;
  parallel_for(a.count, 512, [&](int64_t begin, int64_t end) { run(a, begin, end); });
}

void cross_entropy(const std::string& build, const py::args& given) {
  Type type;
  int64_t T;
  CrossEntropy a{};
  read_all(given, type, T, a.V, a.logits, a.labels, a.losses, a.has_gradient);
  for (int64_t row = 0; row < T; row++)
    if (a.labels[row] < 0 || a.labels[row] >= a.V) throw py::value_error("labels holds " + std::to_string(a.labels[row]) + "; there are " + std::to_string(a.V) + " logits");
  const auto run = find_build(build).cross_entropy;
  const py::gil_scoped_release release;
  parallel_for(T, std::max<int64_t>(1, 16384 / a.V), [&](int64_t begin, int64_t end) { run(a, type, begin, end); });
}

void to_blocks(const std::string& build, const py::args& given) {
  Type type;
  const float* x;
  uint8_t* out;
  int64_t count;
  read_all(given, type, x, out, count);
  const auto run = find_build(build).to_blocks;
  const py::gil_scoped_release release;
  parallel_for(count, 1024, [&](int64_t begin, int64_t end) { run(type, x, out, begin, end); });
}

void apply(const std::string& build, const py::args& given) {
  Primitive primitive;
  const float* x;
  float* y;
  int64_t count;
  read_all(given, primitive, x, y, count);
  const auto run = find_build(build).apply;
  const py::gil_scoped_release release;
  run(primitive, x, y, count);
}

void check_places(const Step& a) {
  for (int64_t b = 0; b < a.B; b++) {
    const int64_t last = a.starts ? a.starts[b] : a.num_keys - 1, first = a.begins ? a.begins[b] : 0;
    if (first < 0 || last >= a.num_keys || (a.starts && last < 0))
      throw py::value_error("row " + std::to_string(b) + " attends " + std::to_string(first) + " ... " + std::to_string(last) + "; the cache holds " + std::to_string(a.num_keys));
    if (a.cos) check_position(a.positions[b], a.num_positions);
  }
}

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

void linear(const std::string& name, const py::args& given) {
  Linear a{};
  read_all(given, a.T, a.m, a.x, a.y);
  const Build& build = find_build(name);
  const py::gil_scoped_release release;
  run(build, {a});
}

// One of the parts that a layer consists of: y = x + f(norm(x)).
struct Part {
  enum Kind : int { SELF_ATTENTION = 0, CROSS_ATTENTION = 1, FEED_FORWARD = 2 } kind;
  Norm norm;
  Matrix q, k, v, out;       // of attention
  Step attending;
  bool adds;                 // cross-attention: out's bias also where nothing is read
  Matrix gate, up, down;     // of a feed-forward; gate.O = 0: none
  Activation activation;
};

Part make_part(const py::tuple& given) {
  Part p{};
  Fields fields(given);
  fields.read(p.kind, p.norm);
  if (p.kind == Part::FEED_FORWARD) {
    fields.read(p.gate, p.up, p.down, p.activation);
  } else {
    fields.read(p.q);
    if (p.kind == Part::SELF_ATTENTION) fields.read(p.k, p.v);
    fields.read(p.out, p.attending, p.adds);
  }
  fields.end();
  return p;
}

// Floats that stay with their thread from step to step.
float* scratch(int slot, int64_t count) {
  static thread_local std::array<std::vector<float>, 5> buffers;
  if (buffers[size_t(slot)].size() < size_t(count)) buffers[size_t(slot)].resize(size_t(count));
  return buffers[size_t(slot)].data();
}

void run(const Build& build, const Part& p, int64_t B, const float* x, float* y) {
  float* normed = scratch(0, B * p.norm.D);
  if (p.kind == Part::FEED_FORWARD) {
    float *gates = scratch(1, B * p.gate.O), *wide = scratch(2, B * p.up.O);
    build.norm(p.norm, x, normed, 0, B);
    if (p.gate.O) run(build, {{B, p.gate, normed, gates, p.activation, nullptr, nullptr}});
    run(build, {{B, p.up, normed, wide, p.gate.O ? NONE : p.activation, p.gate.O ? gates : nullptr, nullptr}});
    return run(build, {{B, p.down, wide, y, NONE, nullptr, x}});
  }
  Step a = p.attending;
  const bool is_empty = p.kind == Part::CROSS_ATTENTION && a.num_keys == 0;
  if (is_empty && !p.adds) {
    std::copy(x, x + B * p.norm.D, y);
    return;
  }
  a.q = scratch(1, B * p.q.O), a.o = scratch(2, B * p.q.O);
  build.norm(p.norm, x, normed, 0, B);
  std::vector<Linear> projections{{B, p.q, normed, a.q, NONE, nullptr, nullptr}};
  if (p.kind == Part::SELF_ATTENTION) {
    a.k = scratch(3, B * p.k.O), a.v = scratch(4, B * p.v.O);
    projections.push_back({B, p.k, normed, a.k, NONE, nullptr, nullptr});
    projections.push_back({B, p.v, normed, a.v, NONE, nullptr, nullptr});
  }
  run(build, projections);
  run(build, a);
  run(build, {{B, p.out, a.o, y, NONE, nullptr, x}});
  for (int64_t b = 0; p.kind == Part::CROSS_ATTENTION && !p.adds && a.valid && b < B; ++b) {
    const uint8_t* row = a.valid + b * a.num_keys;
    if (std::find(row, row + a.num_keys, 1) == row + a.num_keys) std::copy(x + b * p.out.O, x + (b + 1) * p.out.O, y + b * p.out.O);
  }
}

// The parts of a decoder's layers for one new token a row, told once and run at every step.
class Steps {
 public:
  Steps(const std::string& build, const std::vector<py::tuple>& parts) : build_(find_build(build)) {
    for (const py::tuple& part : parts) parts_.push_back(make_part(part));
  }
  // x, y [B, D]: parts first ... last - 1.
  void run_parts(uintptr_t x, uintptr_t y, int64_t B, size_t first, size_t last) const {
    const float* from = reinterpret_cast<const float*>(x);
    if (first >= last || last > parts_.size()) throw std::invalid_argument("there are no such parts");
    for (size_t i = first; i < last; i++)
      if (parts_[i].kind != Part::FEED_FORWARD) check_places(parts_[i].attending);
    const py::gil_scoped_release release;
    std::vector<float> between[2];
    for (size_t i = first; i < last; i++) {
      std::vector<float>& next = between[i % 2];
      next.resize(size_t(B * parts_[i].norm.D));
      float* to = i + 1 == last ? reinterpret_cast<float*>(y) : next.data();
      run(build_, parts_[i], B, from, to);
      from = to;
    }
  }

 private:
  const Build& build_;
  std::vector<Part> parts_;
};

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
  m.def("to_blocks", &to_blocks);
  m.def("apply", &apply);
  m.def("cross_entropy", &cross_entropy);
  py::class_<Steps>(m, "Steps")
      .def(py::init<const std::string&, const std::vector<py::tuple>&>())
      .def("run", &Steps::run_parts);
}
