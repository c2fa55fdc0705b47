// Memory-mapped neighbor loader: chunk ids -> tokens and lengths, from the shards of one or more chunk stores.
//
// Reads the array files of docs/formats.md (128-byte little-endian header, values, one CRC-32 per MiB) and checks
// everything in them before use: sizes and counts at open, each block's checksum when it is first touched. A
// neighbor is row c and the rows after it while they are full and of the same document; id -1 has length 0.
// Letters: M tokens per row, R tokens per neighbor. Python sees one class, Loader; its twin is NumpyLoader.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../compiler.h"

namespace py = pybind11;

namespace {

constexpr uint64_t kHeader = 128;
constexpr uint64_t kBlock = 1 << 20;
const uint64_t kPage = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
constexpr int64_t kAhead = 16;  // rows prefetched ahead of the copy

std::array<std::array<uint32_t, 256>, 8> make_crc_tables() {
  std::array<std::array<uint32_t, 256>, 8> t{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t c = i;
    for (int bit = 0; bit < 8; ++bit) c = (c & 1) ? 0xEDB88320u ^ (c >> 1) : c >> 1;
    t[0][i] = c;
  }
  for (uint32_t i = 0; i < 256; ++i)
    for (int s = 1; s < 8; ++s) t[s][i] = (t[s - 1][i] >> 8) ^ t[0][t[s - 1][i] & 0xFF];
  return t;
}

// CRC-32 (the polynomial of zlib), eight bytes a step.
uint32_t crc32(const uint8_t* p, uint64_t n) {
  static const auto t = make_crc_tables();
  uint32_t c = 0xFFFFFFFFu;
  for (; n >= 8; p += 8, n -= 8) {
    uint32_t a, b;
    std::memcpy(&a, p, 4);
    std::memcpy(&b, p + 4, 4);
    a ^= c;
    c = t[7][a & 0xFF] ^ t[6][(a >> 8) & 0xFF] ^ t[5][(a >> 16) & 0xFF] ^ t[4][a >> 24] ^ t[3][b & 0xFF] ^
        t[2][(b >> 8) & 0xFF] ^ t[1][(b >> 16) & 0xFF] ^ t[0][b >> 24];
  }
  for (; n; ++p, --n) c = t[0][(c ^ *p) & 0xFF] ^ (c >> 8);
  return c ^ 0xFFFFFFFFu;
}

template <typename T>
T read_at(const uint8_t* p, uint64_t offset) {
  T value;
  std::memcpy(&value, p + offset, sizeof(T));
  return value;
}

// n values as int64; the largest of them, -1 for none.
RETRO_CLONES int64_t widen16(const uint16_t* __restrict in, int64_t n, int64_t* __restrict out) {
  uint16_t largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, in[i]);
  for (int64_t i = 0; i < n; ++i) out[i] = in[i];
  return n ? largest : -1;
}
RETRO_CLONES int64_t widen32(const uint32_t* __restrict in, int64_t n, int64_t* __restrict out) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, in[i]);
  for (int64_t i = 0; i < n; ++i) out[i] = in[i];
  return n ? largest : -1;
}

// One array file, mapped. Throws std::runtime_error naming the file and what is wrong with it.
class Array {
 public:
  Array(const std::string& path, const std::string& kind, bool checks_blocks) : path_(path), checks_(checks_blocks) {
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe would wait for its writer
    if (fd < 0) fail("cannot be opened");
    struct stat info {};
    if (::fstat(fd, &info) != 0 || !S_ISREG(info.st_mode) || info.st_size < static_cast<off_t>(kHeader)) {
      ::close(fd);
      fail("is shorter than its header");
    }
    size_ = static_cast<uint64_t>(info.st_size);
    // Linux tells everyone else that all pages are in memory.
    sees_residency_ = ::geteuid() == 0 || ::geteuid() == info.st_uid || ::access(path.c_str(), W_OK) == 0;
    void* base = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, fd, 0);
    ::close(fd);
    if (base == MAP_FAILED) fail("cannot be mapped");
    base_ = static_cast<const uint8_t*>(base);
    try {
      check(kind);
    } catch (...) {
      ::munmap(const_cast<uint8_t*>(base_), size_);
      throw;
    }
    ::madvise(base, size_, MADV_RANDOM);
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { ::munmap(const_cast<uint8_t*>(base_), size_); }

  uint64_t rows() const { return rows_; }
  uint64_t columns() const { return columns_; }
  int item() const { return item_; }
  const uint8_t* row(uint64_t r) const { return base_ + kHeader + r * width_; }

  // The pages, by number, that hold `bytes` bytes from row r on.
  void add_pages(uint64_t r, uint64_t bytes, std::vector<uint64_t>& pages) const {
    const uint64_t start = kHeader + r * width_, stop = std::min(start + bytes, size_);
    for (uint64_t page = start / kPage; page * kPage < stop; ++page) pages.push_back(page);
  }

  // Whether all of up to 16 of these pages are in memory: then asking for them would only cost system calls.
  bool is_warm(const std::vector<uint64_t>& pages) const {
    if (!sees_residency_) return false;
    for (size_t i = 0; i < pages.size(); i += std::max<size_t>(1, pages.size() / 16)) {
      unsigned char resident = 0;
      if (::mincore(const_cast<uint8_t*>(base_) + pages[i] * kPage, 1, &resident) != 0 || !(resident & 1)) return false;
    }
    return true;
  }

  // Ask the kernel to read these pages, all at once instead of one fault after another.
  void will_need(std::vector<uint64_t>& pages) const {
    std::sort(pages.begin(), pages.end());
    pages.erase(std::unique(pages.begin(), pages.end()), pages.end());
    if (is_warm(pages)) return;
    for (size_t i = 0; i < pages.size();) {
      size_t j = i + 1;
      while (j < pages.size() && pages[j] == pages[j - 1] + 1) ++j;
      ::madvise(const_cast<uint8_t*>(base_) + pages[i] * kPage, (j - i) * kPage, MADV_WILLNEED);
      i = j;
    }
  }

  // Check the blocks of one row on first touch.
  void touch(uint64_t r) {
    if (width_ == 0 || !checks_) return;
    const uint64_t first = r * width_ / kBlock, last = ((r + 1) * width_ - 1) / kBlock;
    for (uint64_t b = first; b <= last; ++b)
      if (!checked_[b].load(std::memory_order_relaxed)) check_block(b);
  }

 private:
  [[noreturn]] void fail(const std::string& what) const { throw std::runtime_error(path_ + " " + what); }

  void check(const std::string& kind) {
    if (std::memcmp(base_, "RETROARR", 8) != 0) fail("is not a retro-engine array");
    if (crc32(base_, kHeader - 4) != read_at<uint32_t>(base_, kHeader - 4)) fail("has a damaged header");
    if (read_at<uint32_t>(base_, 8) != 1) fail("has another format version");
    if (read_at<uint32_t>(base_, 12) != 0x01020304u) fail("has another byte order");
    char name[13] = {}, code[9] = {};
    std::memcpy(name, base_ + 20, 12);
    std::memcpy(code, base_ + 32, 8);
    if (kind != name) fail("holds '" + std::string(name) + "', expected '" + kind + "'");
    if (code[0] != 'u' || (code[1] != '2' && code[1] != '4') || code[2] != 0) fail("has an unexpected type");
    item_ = code[1] - '0';
    rows_ = read_at<uint64_t>(base_, 40);
    columns_ = read_at<uint64_t>(base_, 48);
    const uint64_t bytes = read_at<uint64_t>(base_, 56);
    const uint64_t block = read_at<uint32_t>(base_, 96), blocks = read_at<uint32_t>(base_, 100);
    uint64_t expected = 0;
    if (__builtin_mul_overflow(rows_, columns_, &expected) || __builtin_mul_overflow(expected, item_, &expected) ||
        expected != bytes || bytes > size_ || block != kBlock || blocks != (bytes + kBlock - 1) / kBlock ||
        size_ != kHeader + bytes + 4 * blocks)
      fail("contradicts its size");
    bytes_ = bytes;
    width_ = columns_ * item_;
    checked_ = std::vector<std::atomic<bool>>(blocks);
  }

  void check_block(uint64_t b) {
    const uint64_t start = b * kBlock, n = std::min(kBlock, bytes_ - start);
    if (crc32(base_ + kHeader + start, n) != read_at<uint32_t>(base_, kHeader + bytes_ + 4 * b))
      fail("is damaged in block " + std::to_string(b));
    checked_[b].store(true, std::memory_order_relaxed);
  }

  std::string path_;
  bool checks_;
  bool sees_residency_ = false;
  const uint8_t* base_ = nullptr;
  uint64_t size_ = 0, rows_ = 0, columns_ = 0, bytes_ = 0, width_ = 0;
  int item_ = 0;
  std::vector<std::atomic<bool>> checked_;
};

struct Shard {
  Array tokens, lengths, rows;
  uint64_t first_row;
};

class Loader {
 public:
  // shards: (tokens, lengths, rows) paths, in the order in which ids count through them.
  // checks_blocks: compare each block's checksum when it is first touched, which reads all of the block.
  Loader(const std::vector<std::array<std::string, 3>>& shards, uint64_t chunk_size, int64_t vocab_size,
         bool checks_blocks)
      : chunk_size_(chunk_size), vocab_size_(vocab_size) {
    for (const auto& paths : shards) {
      auto shard = std::unique_ptr<Shard>(
          new Shard{{paths[0], "tokens", checks_blocks},
                    {paths[1], "lengths", checks_blocks},
                    {paths[2], "rows", checks_blocks},
                    num_rows_});
      const uint64_t rows = shard->tokens.rows();
      if (shard->tokens.columns() != chunk_size_ || shard->lengths.columns() != 1 || shard->rows.columns() != 1 ||
          shard->lengths.rows() != rows || shard->rows.rows() != rows || shard->lengths.item() != 2 ||
          shard->rows.item() != 4)
        throw std::runtime_error(paths[0] + " and its lengths and rows do not fit together");
      num_rows_ += rows;
      shards_.push_back(std::move(shard));
    }
  }

  uint64_t num_rows() const { return num_rows_; }

  // ids [n] int64 -> (tokens [n, R] int64, lengths [n] int64), into `into` where it is given.
  py::tuple gather(py::array_t<int64_t, py::array::c_style | py::array::forcecast> ids, int64_t length, int64_t pad_id,
                   std::optional<py::array_t<int64_t, py::array::c_style>> into) {
    if (length < 1) throw py::value_error("retrieved_length=" + std::to_string(length) + ": must be at least 1");
    const int64_t n = ids.size();
    if (into && (into->ndim() != 2 || into->shape(0) != n || into->shape(1) != length))
      throw py::value_error("out has another shape than [ids, retrieved_length]");
    py::array_t<int64_t> lengths(n);
    py::array_t<int64_t, py::array::c_style> tokens = into ? *into : py::array_t<int64_t, py::array::c_style>({n, length});
    const int64_t* in = ids.data();
    int64_t* out = tokens.mutable_data();
    int64_t* valid = lengths.mutable_data();
    {
      py::gil_scoped_release release;
      for (int64_t i = 0; i < n; ++i)
        if (in[i] < -1 || in[i] >= static_cast<int64_t>(num_rows_))
          throw py::value_error("chunk id " + std::to_string(in[i]) + " is outside 0 ... " +
                                std::to_string(static_cast<int64_t>(num_rows_) - 1) + " (-1 = missing)");
      will_need(in, n, length);
      for (int64_t i = 0; i < n; ++i) {
        if (i + kAhead < n && in[i + kAhead] >= 0) prefetch(static_cast<uint64_t>(in[i + kAhead]), length);
        int64_t got = in[i] < 0 ? 0 : copy(static_cast<uint64_t>(in[i]), length, out + i * length);
        valid[i] = got;
        std::fill(out + i * length + got, out + (i + 1) * length, pad_id);
      }
    }
    return py::make_tuple(tokens, lengths);
  }

 private:
  Shard& shard_of(uint64_t row) {
    size_t low = 0, high = shards_.size();
    while (high - low > 1) {
      const size_t middle = (low + high) / 2;
      (shards_[middle]->first_row <= row ? low : high) = middle;
    }
    return *shards_[low];
  }

  // Read ahead what `ids` need, shard by shard, where it is not in memory yet.
  void will_need(const int64_t* ids, int64_t n, int64_t length) const {
    for (const auto& shard : shards_) {
      std::vector<uint64_t> tokens, lengths, rows;
      const int64_t stride = n > 4096 ? n / 64 : 1;  // of a large warm batch a sample says enough
      for (int pass = stride > 1 ? 0 : 1; pass < 2; ++pass) {
        tokens.clear(), lengths.clear(), rows.clear();
        for (int64_t i = 0; i < n; i += pass ? 1 : stride) {
          const int64_t r = ids[i] - static_cast<int64_t>(shard->first_row);
          if (r < 0 || r >= static_cast<int64_t>(shard->tokens.rows())) continue;
          shard->tokens.add_pages(static_cast<uint64_t>(r), static_cast<uint64_t>(length * shard->tokens.item()), tokens);
          shard->lengths.add_pages(static_cast<uint64_t>(r), 2, lengths);
          shard->rows.add_pages(static_cast<uint64_t>(r), 4, rows);
        }
        if (pass == 0 && shard->tokens.is_warm(tokens)) break;
        if (pass == 1) {
          shard->tokens.will_need(tokens);
          shard->lengths.will_need(lengths);
          shard->rows.will_need(rows);
        }
      }
    }
  }

  // The cache lines of a row and its continuation; past the end of the file a prefetch does nothing.
  void prefetch(uint64_t row, int64_t length) {
    const Shard& s = shard_of(row);
    const uint64_t r = row - s.first_row;
    const uint8_t* p = s.tokens.row(r);
    for (int64_t byte = 0; byte < length * s.tokens.item(); byte += 64) __builtin_prefetch(p + byte);
    __builtin_prefetch(s.lengths.row(r));
    __builtin_prefetch(s.rows.row(r));
  }

  // Copy row r and its continuation, at most `length` tokens; return how many are valid.
  int64_t copy(uint64_t row, int64_t length, int64_t* out) {
    Shard& s = shard_of(row);
    uint64_t r = row - s.first_row;
    s.rows.touch(r);
    const uint32_t document = read_at<uint32_t>(s.rows.row(r), 0);
    int64_t done = 0;
    while (done < length && r < s.tokens.rows()) {
      s.rows.touch(r);
      if (read_at<uint32_t>(s.rows.row(r), 0) != document) break;
      s.lengths.touch(r);
      s.tokens.touch(r);
      const int64_t in_row = read_at<uint16_t>(s.lengths.row(r), 0);
      if (in_row < 1 || in_row > static_cast<int64_t>(chunk_size_))
        throw std::runtime_error("row " + std::to_string(s.first_row + r) + " has an impossible length");
      done += std::min(in_row, length - done);
      if (in_row < static_cast<int64_t>(chunk_size_)) break;
      ++r;
    }
    widen(s.tokens, row - s.first_row, done, out);  // every row before the last is full: the tokens are contiguous
    return done;
  }

  // Token ids of a row as int64; an id outside the vocabulary must not reach an embedding.
  void widen(const Array& tokens, uint64_t r, int64_t n, int64_t* out) const {
    const int64_t largest = tokens.item() == 2 ? widen16(reinterpret_cast<const uint16_t*>(tokens.row(r)), n, out)
                                               : widen32(reinterpret_cast<const uint32_t*>(tokens.row(r)), n, out);
    if (largest >= vocab_size_)
      throw std::runtime_error("token id " + std::to_string(largest) + " is outside the vocabulary of " +
                               std::to_string(vocab_size_));
  }

  std::vector<std::unique_ptr<Shard>> shards_;
  uint64_t num_rows_ = 0;
  uint64_t chunk_size_;
  int64_t vocab_size_;
};

// Rows `ids` of a 2-D uint16 array copied into `out`, as uint16 or widened to int64, with prefetching and nothing else:
// the raw gather, and the limit that the loader is measured against.
template <typename T>
void copy_rows(const py::array_t<uint16_t, py::array::c_style>& values,
               const py::array_t<int64_t, py::array::c_style>& ids, py::array_t<T, py::array::c_style>& out) {
  const int64_t n = ids.size(), width = values.shape(1), rows = values.shape(0);
  if (out.ndim() != 2 || out.shape(0) != n || out.shape(1) != width) throw py::value_error("out has another shape");
  const uint16_t* from = values.data();
  const int64_t* in = ids.data();
  T* to = out.mutable_data();
  for (int64_t i = 0; i < n; ++i)
    if (in[i] < 0 || in[i] >= rows) throw py::value_error("row " + std::to_string(in[i]) + " does not exist");
  const py::gil_scoped_release release;
  for (int64_t i = 0; i < n; ++i) {
    if (i + kAhead < n)
      for (int64_t byte = 0; byte < 2 * width; byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(from + in[i + kAhead] * width) + byte);
    if constexpr (sizeof(T) == 2) {
      const char* source = reinterpret_cast<const char*>(from + in[i] * width);
      char* target = reinterpret_cast<char*>(to + i * width);
      int64_t byte = 0;
      for (; byte + 64 <= 2 * width; byte += 64) std::memcpy(target + byte, source + byte, 64);  // inlined: no call a row
      if (byte < 2 * width) std::memcpy(target + byte, source + byte, static_cast<size_t>(2 * width - byte));
    } else
      widen16(from + in[i] * width, width, to + i * width);
  }
}

}  // namespace

PYBIND11_MODULE(_loader, m) {
  m.doc() = "Memory-mapped neighbor loader";
  m.def("copy_rows", &copy_rows<uint16_t>, py::arg("values"), py::arg("ids"), py::arg("out").noconvert());
  m.def("copy_rows", &copy_rows<int64_t>, py::arg("values"), py::arg("ids"), py::arg("out").noconvert());
  py::class_<Loader>(m, "Loader")
      .def(py::init<const std::vector<std::array<std::string, 3>>&, uint64_t, int64_t, bool>(), py::arg("shards"),
           py::arg("chunk_size"), py::arg("vocab_size"), py::arg("checks_blocks") = true)
      .def_property_readonly("num_rows", &Loader::num_rows)
      .def("gather", &Loader::gather, py::arg("ids"), py::arg("retrieved_length"), py::arg("pad_id"),
           py::arg("out").noconvert() = py::none());
}
