// retro_kernels._cpu: attention, RoPE, gathering, cross-entropy and decoding steps on CPU tensors, given as addresses, sizes and strides (kernels/cpp.py checks
// them). No torch header: the module builds anywhere and works with any torch. Threads are torch's own: the address
// of libtorch's torch_parallel_for is handed over at import; without it everything runs on the calling thread.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <functional>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

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
// dropout: drop_below, the seed's low and high half; factors: scale, 1 / (1 - dropout).
typedef std::array<int64_t, 3> Dropout;
Attention make_attention(const std::array<int64_t, 15>& sizes, const std::array<float, 2>& factors, const Dropout& dropout, const std::array<int64_t, 21>& strides, const std::vector<uintptr_t>& addresses) {
  Attention a{};
  int64_t* fields[] = {&a.B, &a.L, &a.KV, &a.G, &a.E, &a.N, &a.num_queries, &a.query_step, &a.query_first, &a.K, &a.R, &a.P, &a.query_offset, &a.query_period};
  for (int i = 0; i < 14; i++) *fields[i] = sizes[size_t(i)];
  a.is_causal = sizes[14] != 0;
  a.scale = factors[0], a.keep = factors[1];
  a.drop_below = int32_t(dropout[0]), a.seed_low = uint32_t(dropout[1]), a.seed_high = uint32_t(dropout[2]);
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

void attention(const std::string& build, int type, const std::array<int64_t, 15>& sizes, const std::array<float, 2>& factors, const Dropout& dropout, const std::array<int64_t, 21>& strides, const std::vector<uintptr_t>& addresses) {
  const Attention a = make_attention(sizes, factors, dropout, strides, addresses);
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

// sizes: T V has_gradient; addresses: logits labels losses.
void cross_entropy(const std::string& name, int type, const std::array<int64_t, 3>& sizes, const std::array<uintptr_t, 3>& addresses) {
  CrossEntropy a{};
  const int64_t T = sizes[0];
  a.V = sizes[1], a.has_gradient = sizes[2] != 0;
  a.logits = pointer<void>(addresses[0]), a.labels = pointer<int64_t>(addresses[1]), a.losses = pointer<float>(addresses[2]);
  for (int64_t row = 0; row < T; row++)
    if (a.labels[row] < 0 || a.labels[row] >= a.V) throw py::value_error("labels holds " + std::to_string(a.labels[row]) + "; there are " + std::to_string(a.V) + " logits");
  const auto run = find_build(name).cross_entropy;
  const py::gil_scoped_release release;
  parallel_for(T, std::max<int64_t>(1, 16384 / a.V), [&](int64_t begin, int64_t end) { run(a, Type(type), begin, end); });
}

// addresses: x y, `count` floats each.
void apply(const std::string& name, int primitive, const std::array<uintptr_t, 2>& addresses, int64_t count) {
  const auto run = find_build(name).apply;
  const py::gil_scoped_release release;
  run(Primitive(primitive), pointer<float>(addresses[0]), pointer<float>(addresses[1]), count);
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
    a.type = Type(integer()), a.row_stride = integer(), a.token_stride = integer(), a.head_stride = integer(), a.num_keys = integer(), a.num_positions = integer();
    a.keys = address<void>(), a.values = address<void>();
    a.begins = address<int64_t>(), a.starts = address<int64_t>(), a.valid = address<uint8_t>();
    a.positions = address<int64_t>(), a.cos = address<float>(), a.sin = address<float>();
    a.scale = scale;
    return a;
  }

 private:
  std::vector<int64_t>::const_iterator next_, end_;
};

void check_places(const Step& a) {
  for (int64_t b = 0; b < a.B; b++) {
    const int64_t last = a.starts ? a.starts[b] : a.num_keys - 1, first = a.begins ? a.begins[b] : 0;
    if (first < 0 || last >= a.num_keys || (a.starts && last < 0))
      throw py::value_error("row " + std::to_string(b) + " attends " + std::to_string(first) + " ... " + std::to_string(last) + "; the cache holds " + std::to_string(a.num_keys));
    if (a.cos && (a.positions[b] < 0 || a.positions[b] >= a.num_positions))
      throw py::value_error("positions holds " + std::to_string(a.positions[b]) + "; cos has " + std::to_string(a.num_positions) + " positions");
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

// Asks for large pages where weights lie, once a page: reading them in order is then faster (fewer translations). A system
// that has none to give goes on with small ones.
void ask_for_large_pages(const void* begin, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t SIZE = uintptr_t(1) << 21;
  constexpr int COLLAPSE = 25;  // MADV_COLLAPSE, Linux 6.1
  static std::set<uintptr_t> asked;
  static std::mutex lock;
  const std::lock_guard<std::mutex> guard(lock);
  const uintptr_t end = reinterpret_cast<uintptr_t>(begin) + uintptr_t(bytes);
  for (uintptr_t page = reinterpret_cast<uintptr_t>(begin) / SIZE * SIZE; page < end; page += SIZE)
    if (asked.insert(page).second) madvise(reinterpret_cast<void*>(page), SIZE, COLLAPSE);
#else
  (void)begin, (void)bytes;
#endif
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

Part make_part(const std::vector<int64_t>& values, float eps, float scale) {
  Fields fields(values);
  Part p{};
  p.kind = Part::Kind(fields.integer());
  if (p.kind == Part::FEED_FORWARD) {
    p.activation = Activation(fields.integer());
    p.norm = fields.norm(eps);
    p.gate = fields.matrix(), p.up = fields.matrix(), p.down = fields.matrix();
    return p;
  }
  p.adds = p.kind == Part::CROSS_ATTENTION && fields.integer() != 0;
  p.norm = fields.norm(eps);
  p.q = fields.matrix();
  if (p.kind == Part::SELF_ATTENTION) p.k = fields.matrix(), p.v = fields.matrix();
  p.out = fields.matrix();
  p.attending = fields.attention(scale);
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
  Steps(const std::string& build, const std::vector<std::vector<int64_t>>& fields, const std::vector<std::array<float, 2>>& factors) : build_(find_build(build)) {
    for (size_t i = 0; i < fields.size(); i++) {
      parts_.push_back(make_part(fields[i], factors.at(i)[0], factors.at(i)[1]));
    }
    const py::gil_scoped_release release;
    for (const Part& p : parts_)
      for (const Matrix& m : {p.q, p.k, p.v, p.out, p.gate, p.up, p.down})
        if (m.w) ask_for_large_pages(m.w, m.O * m.D * (m.type == FLOAT32 ? 4 : m.type == BFLOAT16 ? 2 : 1));
  }
  // x, y [B, D]: parts first ... last - 1.
  void run_parts(uintptr_t x, uintptr_t y, int64_t B, size_t first, size_t last) const {
    const float* from = pointer<const float>(x);
    if (first >= last || last > parts_.size()) throw std::invalid_argument("there are no such parts");
    for (size_t i = first; i < last; i++)
      if (parts_[i].kind != Part::FEED_FORWARD) check_places(parts_[i].attending);
    const py::gil_scoped_release release;
    std::vector<float> between[2];
    for (size_t i = first; i < last; i++) {
      std::vector<float>& next = between[i % 2];
      next.resize(size_t(B * parts_[i].norm.D));
      float* to = i + 1 == last ? pointer<float>(y) : next.data();
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
  m.def("apply", &apply);
  m.def("cross_entropy", &cross_entropy);
  py::class_<Steps>(m, "Steps")
      .def(py::init<const std::string&, const std::vector<std::vector<int64_t>>&, const std::vector<std::array<float, 2>>&>())
      .def("run", &Steps::run_parts);
}
