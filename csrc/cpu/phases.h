// Work in phases that all threads of one parallel region go through together, each in small pieces that are taken from a counter. A
// phase is over when its pieces are done, whoever did them: nobody waits for a thread that holds none, so one that another process has
// put off its core costs what it holds and no more. Who waits spins for some microseconds, and then gives its core away in naps.
#pragma once
#include <atomic>
#include <chrono>
#include <exception>
#include <memory>
#include <thread>

#include "kernels.h"

namespace retro {

class Phases {
 public:
  explicit Phases(size_t most) : most_(most), counts_(new Count[most]) {}

  // work(begin, end) over [0, count); every thread calls it for the same phases in the same order, `at` its own place. Pieces are a
  // multiple of `least`, and less the less there is left: long runs of memory first, and at the end nobody waits long.
  template <class Work>
  void share(size_t& at, int64_t count, int64_t least, int64_t threads, const Work& work) {
    if (at == most_) std::terminate();  // a bug: the phases were not counted
    Count& c = counts_[at++];
    for (int64_t begin = c.taken.load(std::memory_order_relaxed); begin < count;) {
      const int64_t piece = threads == 1 ? count : std::max<int64_t>(1, (count - begin) / (2 * threads * least)) * least;
      const int64_t end = std::min(begin + piece, count);
      if (!c.taken.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
      attempt([&] { work(begin, end); });
      c.done.fetch_add(end - begin, std::memory_order_acq_rel);
      begin = c.taken.load(std::memory_order_relaxed);
    }
    for (int spins = 0; c.done.load(std::memory_order_acquire) < count; ++spins) wait(spins);
  }
  // Once all threads have left: what one of them threw.
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  static constexpr int SPINS = 1000;  // 10 to 50 us
  struct alignas(128) Count {
    std::atomic<int64_t> taken{0};
    alignas(64) std::atomic<int64_t> done{0};
  };
  static void wait(int spins) {
    if (spins >= SPINS) return std::this_thread::sleep_for(std::chrono::microseconds(5));
#ifdef RETRO_X86
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
  template <class Work>
  void attempt(const Work& work) {
    try {
      work();
    } catch (...) {  // out of memory: the others must not wait for ever
      if (!has_failed_.exchange(true)) error_ = std::current_exception();
    }
  }

  size_t most_;
  std::unique_ptr<Count[]> counts_;
  std::atomic<bool> has_failed_{false};
  std::exception_ptr error_;
};

}  // namespace retro
