// retro_kernels._cpu: attention, RoPE, gathering, norms, cross-entropy and decoding steps on CPU tensors. Every function takes a build's
// name and a kernel's fields, numbers and tensors, in the one order in which it reads them (kernels/cpp.py checks and writes them). No torch header: the module builds anywhere and works with any torch. Threads are torch's own: the address of
// libtorch's torch_parallel_for is handed over at import; without it everything runs on the calling thread.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"
#ifdef RETRO_X86
#include <cpuid.h>
#endif
#include "phases.h"

namespace py = pybind11;
using namespace retro;

namespace {

typedef int32_t (*ParallelFor)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);
typedef int32_t (*NumThreads)(uint32_t*);
ParallelFor parallel_for_address = nullptr;
NumThreads num_threads_address = nullptr;

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
    read(a.B, a.H, a.G, a.E, a.P, a.type, a.keys, a.values, a.num_rows, a.row_stride, a.token_stride, a.head_stride, a.num_keys);
    read(a.rows, a.begins, a.starts, a.valid, a.positions, a.cos, a.sin, a.num_positions, a.is_interleaved, a.scale);
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

// Before memory is written for the first time: with large pages it takes a five hundredth of the faults. Where there are none, nothing.
void ask_large_pages([[maybe_unused]] void* base, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t PAGE = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(base), first = (begin + PAGE - 1) / PAGE * PAGE, last = (begin + bytes) / PAGE * PAGE;
  if (last > first) ::madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
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
  for (void* gradients : {a.grad_k, a.grad_v})
    if (gradients) ask_large_pages(gradients, a.B * a.L * a.K * a.R * a.KV * a.E * (type == FLOAT32 ? 4 : 2));
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

void norm(const std::string& build, const py::args& given) {
  Type type;
  Norm a{};
  int64_t T;
  const void* x;
  void* y;
  read_all(given, type, a, T, x, y);
  const auto run = find_build(build).norm;
  const py::gil_scoped_release release;
  parallel_for(T, std::max<int64_t>(1, 16384 / a.D), [&](int64_t begin, int64_t end) { run(a, type, x, y, begin, end); });
}

void widen(const std::string& build, const py::args& given) {
  const int8_t* w;
  const float* scale;
  void* y;
  int64_t O, D;
  read_all(given, O, D, w, scale, y);
  const auto run = find_build(build).widen;
  const py::gil_scoped_release release;
  parallel_for(O, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, D)), [&](int64_t begin, int64_t end) { run(w, scale, y, D, begin, end); });
}

void swiglu(const std::string& build, const py::args& given) {
  Type type;
  int64_t count;
  const void *gate, *up;
  void* y;
  read_all(given, type, count, gate, up, y);
  const auto run = find_build(build).swiglu;
  const py::gil_scoped_release release;
  parallel_for(count, 16384, [&](int64_t begin, int64_t end) { run(type, gate, up, y, begin, end); });
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
    if (a.row(b) < 0 || a.row(b) >= a.num_rows)
      throw py::value_error("row " + std::to_string(a.row(b)) + " of the cache; it has " + std::to_string(a.num_rows));
    if (a.cos) check_position(a.positions[b], a.num_positions);
  }
}

int64_t num_threads() {
  uint32_t count = 1;
  if (num_threads_address == nullptr || parallel_for_address == nullptr || num_threads_address(&count) != 0) return 1;
  return int64_t(count);
}

int64_t bytes_of(const Matrix& m) { return m.O * m.D * (m.type == FLOAT32 ? 4 : m.type == BFLOAT16 ? 2 : 1); }  // of blocks at most

// One parallel region, whose threads share products and what is between them.
class Region {
 public:
  typedef Phases::Place Place;
  Region(const Build& build, size_t most_phases, int64_t bytes) : build_(build), threads_(bytes < ALONE ? 1 : num_threads()), phases_(most_phases, threads_) {
    static std::atomic<uint64_t> tickets{1};
    ticket_ = tickets.fetch_add(most_phases);
  }
  // body(place) on every thread.
  void run(const std::function<void(Place&)>& body) {
    const auto enter = [&](int64_t, int64_t) {
      Place at = phases_.enter();
      body(at);
    };
    if (threads_ == 1) enter(0, 1);
    else parallel_for(threads_, 1, enter);
    phases_.rethrow();
  }
  template <class Work>
  void share(Place& at, int64_t count, const Work& work) { phases_.share(at, count, 1, work); }

  // Linear layers on the same input, normed before where a norm is given. `joint`: they have outputs of one number, and the same piece of
  // each is computed after the other; else all outputs of all are divided.
  void linear(Place& at, std::initializer_list<Linear> layers, const Norm* norm, bool joint = false) {
    const uint64_t ticket = ticket_ + at.phase;
    int64_t outputs = 0;
    for (const Linear& layer : layers) outputs = joint ? layer.m.O : outputs + layer.m.O;
    phases_.share(at, outputs, ROUND, [&](int64_t begin, int64_t end) {
      const float* normed = norm ? rows_normed(*norm, *layers.begin(), ticket) : nullptr;
      int64_t first = 0;
      for (Linear layer : layers) {
        const int64_t from = std::max(begin - first, int64_t(0)), to = std::min(end - first, layer.m.O);
        layer.ticket = ticket;
        if (normed) layer.x = normed;
        if (from < to) build_.linear(layer, from, to);
        if (!joint) first += layer.m.O;
      }
    });
  }

  // One on many rows, with weights in bytes or blocks.
  void many_rows(Place& at, Linear layer) {
    layer.ticket = ticket_ + at.phase;
    phases_.share(at, layer.m.O, 32, [&](int64_t begin, int64_t end) { build_.many_rows(layer, begin, end); });
  }

 private:
  static constexpr int64_t ALONE = 1 << 18;  // bytes of weights below which a thread is done before another has come
  static constexpr int64_t ROUND = 48;  // outputs of a piece are a multiple of it: whole groups and tiles
  // Of a few rows every thread norms all: waiting for another to do it takes longer.
  const float* rows_normed(const Norm& norm, const Linear& layer, uint64_t ticket) const {
    static thread_local std::vector<float> rows;
    static thread_local uint64_t known = 0;
    if (known != ticket) {
      known = 0;
      rows.resize(size_t(layer.T * norm.D));
      build_.norm(norm, FLOAT32, layer.x, rows.data(), 0, layer.T);
      known = ticket;
    }
    return rows.data();
  }

  const Build& build_;
  int64_t threads_;
  Phases phases_;
  uint64_t ticket_;
};

void linear(const std::string& name, const py::args& given) {
  Linear a{};
  read_all(given, a.T, a.m, a.x, a.y);
  const Build& build = find_build(name);
  const py::gil_scoped_release release;
  Region region(build, 1, bytes_of(a.m) * std::max<int64_t>(1, a.T / 4));
  region.run([&](Region::Place& at) { region.linear(at, {a}, nullptr); });
}

void many_rows(const std::string& name, const py::args& given) {
  Linear a{};
  read_all(given, a.T, a.m, a.x, a.y);
  const Build& build = find_build(name);
  if (!build.many_rows) throw std::invalid_argument(name + " has no matrix unit");
  const py::gil_scoped_release release;
  constexpr int64_t AT_ONCE = 512;  // rows, whose inputs and sums stay in L2
  for (int64_t row = 0; row < a.T; row += AT_ONCE) {
    Linear part = a;
    part.T = std::min(AT_ONCE, a.T - row), part.x += row * a.m.D, part.y += row * a.m.O;
    Region region(build, 1, bytes_of(a.m) * part.T);
    region.run([&](Region::Place& at) { region.many_rows(at, part); });
  }
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

// What is between the products of a part; every part's lies in the same memory.
struct Between {
  std::vector<float> q, o, k, v, gates, wide, reads;
  std::unique_ptr<std::atomic<int32_t>[]> left;
  size_t num_left = 0;

  static float* room(std::vector<float>& buffer, int64_t count) {
    if (buffer.size() < size_t(count)) buffer.resize(size_t(count));
    return buffer.data();
  }
  // The part's arguments with this memory in them; before the threads begin, and again (nothing moves then) by each.
  void reserve(const Part& p, int64_t B) {
    if (p.kind == Part::FEED_FORWARD) {
      room(gates, B * p.gate.O), room(wide, B * p.up.O);
      return;
    }
    const Step a = step(p);
    room(q, B * p.q.O), room(o, B * p.q.O), room(k, B * p.k.O), room(v, B * p.v.O), room(reads, B * a.H * a.splits * (a.E + 2));
    if (num_left < size_t(B * a.G)) left.reset(new std::atomic<int32_t>[num_left = size_t(B * a.G)]);
  }
  Step step(const Part& p) {
    Step a = p.attending;
    int64_t keys = 1;
    for (int64_t b = 0; b < a.B; b++) keys = std::max(keys, a.starts ? a.starts[b] + 1 : a.num_keys);
    a.splits = (keys + KEYS_AT_ONCE - 1) / KEYS_AT_ONCE;
    a.q = q.data(), a.o = o.data(), a.reads = reads.data(), a.left = left.get();
    if (p.kind == Part::SELF_ATTENTION) a.k = k.data(), a.v = v.data();
    return a;
  }
};
constexpr size_t PHASES = 5;  // of a part, at most

void run(const Build& build, Region& region, Region::Place& at, const Part& p, Between& between, int64_t B, const float* x, float* y) {
  const auto layer = [B](const Matrix& m, const float* from, float* to) { return Linear{B, m, from, to, NONE, nullptr, nullptr, 0}; };
  const auto added = [&](const Matrix& m, const float* from) { return Linear{B, m, from, y, NONE, nullptr, x, 0}; };
  if (p.kind == Part::FEED_FORWARD) {
    Linear gate = layer(p.gate, x, between.gates.data()), up = layer(p.up, x, between.wide.data());
    if (p.gate.O) gate.activation = p.activation, up.factor = gate.y;
    else up.activation = p.activation;
    if (p.gate.O) region.linear(at, {gate, up}, &p.norm, true);
    else region.linear(at, {up}, &p.norm);
    return region.linear(at, {added(p.down, up.y)}, nullptr);
  }
  const Step a = between.step(p);
  const bool is_cross = p.kind == Part::CROSS_ATTENTION, skips = is_cross && !p.adds;
  const auto pass = [&](int64_t begin, int64_t end) { std::copy(x + begin * p.norm.D, x + end * p.norm.D, y + begin * p.norm.D); };
  if (skips && a.num_keys == 0) return region.share(at, B, pass);
  if (is_cross) region.linear(at, {layer(p.q, x, a.q)}, &p.norm);
  else region.linear(at, {layer(p.q, x, a.q), layer(p.k, x, a.k), layer(p.v, x, a.v)}, &p.norm);
  region.share(at, B, [&](int64_t begin, int64_t end) { build.put(a, begin, end); });
  region.share(at, B * a.G * a.splits, [&](int64_t begin, int64_t end) { build.attend(a, begin, end); });
  region.linear(at, {added(p.out, a.o)}, nullptr);
  if (!skips || !a.valid) return;
  region.share(at, B, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const uint8_t* row = a.valid + b * a.num_keys;
      if (std::find(row, row + a.num_keys, 1) == row + a.num_keys) pass(b, b + 1);
    }
  });
}

// The parts of a decoder's layers for one new token a row, told once and run at every step.
class Steps {
 public:
  Steps(const std::string& build, const std::vector<py::tuple>& parts) : build_(find_build(build)) {
    for (const py::tuple& part : parts) parts_.push_back(make_part(part));
    for (const Part& p : parts_)
      for (const Matrix& m : {p.q, p.k, p.v, p.out, p.gate, p.up, p.down})
        if (m.w) bytes_ += bytes_of(m);
  }
  // x, y [B, D]: parts first ... last - 1.
  void run_parts(uintptr_t x, uintptr_t y, int64_t B, size_t first, size_t last) const {
    const float* from = reinterpret_cast<const float*>(x);
    if (first >= last || last > parts_.size()) throw std::invalid_argument("there are no such parts");
    for (size_t i = first; i < last; i++)
      if (parts_[i].kind != Part::FEED_FORWARD) check_places(parts_[i].attending);
    const py::gil_scoped_release release;
    Between between;
    std::vector<float> states[2];
    for (size_t i = first; i < last; i++) {
      between.reserve(parts_[i], B);
      Between::room(states[i % 2], B * parts_[i].norm.D);
    }
    Region region(build_, PHASES * (last - first), bytes_);
    region.run([&](Region::Place& at) {
      const float* state = from;
      for (size_t i = first; i < last; i++) {
        float* to = i + 1 == last ? reinterpret_cast<float*>(y) : states[i % 2].data();
        run(build_, region, at, parts_[i], between, B, state, to);
        state = to;
      }
    });
  }

 private:
  const Build& build_;
  std::vector<Part> parts_;
  int64_t bytes_ = 0;  // of all weights
};

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.def("builds", [] {
    std::vector<std::string> names;
    for (const Build* build : supported_builds()) names.push_back(build->name);
    return names;
  }, "The instruction sets that this processor has, best first.");
  m.def("set_threads", [](uintptr_t parallel_for, uintptr_t num_threads) {
    parallel_for_address = reinterpret_cast<ParallelFor>(parallel_for);
    num_threads_address = reinterpret_cast<NumThreads>(num_threads);
  });
  m.def("attention", &attention);
  m.def("rope", &rope);
  m.def("gather_neighbors", &gather_neighbors);
  m.def("linear", &linear);
  m.def("many_rows", &many_rows);
  m.def("norm", &norm);
  m.def("widen", &widen);
  m.def("swiglu", &swiglu);
  m.def("to_blocks", &to_blocks);
  m.def("apply", &apply);
  m.def("cross_entropy", &cross_entropy);
  py::class_<Steps>(m, "Steps")
      .def(py::init<const std::string&, const std::vector<py::tuple>&>())
      .def("run", &Steps::run_parts);
}
