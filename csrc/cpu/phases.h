// Work in phases that all threads of one parallel region go through together. Each thread has a range of a phase's items, takes pieces
// from its front, and then from the backs of the others' ranges. A phase is over when its items are done, whoever did them: nobody waits
// for a thread that holds none, so one that another process has put off its core costs what it holds and no more. Who waits spins for
// microseconds, and then gives its core away in naps.
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
  Phases(size_t most, int64_t threads) : most_(most), threads_(threads), done_(new Done[most]), taken_(new Taken[most * size_t(threads)]) {}

  // A thread's place in the phases; made by each that takes part.
  struct Place {
    size_t phase = 0;
    int64_t thread;
  };
  Place enter() { return {0, entered_.fetch_add(1) % threads_}; }

  // work(begin, end) over [0, count) in pieces, multiples of `least`; every thread calls it for the same phases in the same order.
  template <class Work>
  void share(Place& at, int64_t count, int64_t least, const Work& work) {
    if (at.phase == most_) std::terminate();  // a bug: the phases were not counted
    std::atomic<int64_t>& done = done_[at.phase].items;
    Taken* taken = &taken_[at.phase++ * size_t(threads_)];
    if (threads_ == 1) return work(0, count);
    const int64_t size = ((count + threads_ - 1) / threads_ + least - 1) / least * least;
    for (int64_t i = 0; i < threads_; ++i) {
      const int64_t owner = (at.thread + i) % threads_, first = std::min(owner * size, count), last = std::min(first + size, count);
      for (Piece piece; (piece = take(taken[owner], first, last, least, i > 0)).begin < piece.end;) {
        attempt([&] { work(piece.begin, piece.end); });
        done.fetch_add(piece.end - piece.begin, std::memory_order_acq_rel);
      }
    }
    if (at.phase < most_ && done.load(std::memory_order_acquire) < count) wait(done, count);  // after the last one the region's end waits
  }
  // Once all threads have left: what one of them threw.
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  static constexpr int SPINS = 400;  // 5 to 25 us
  struct Piece { int64_t begin = 0, end = 0; };
  struct alignas(64) Done { std::atomic<int64_t> items{0}; };
  struct alignas(64) Taken { std::atomic<uint64_t> ends{0}; };  // items from the front; from the back, in the upper half

  // A quarter of what is left of a range, from its front or its back.
  static Piece take(Taken& taken, int64_t first, int64_t last, int64_t least, bool from_back) {
    for (uint64_t ends = taken.ends.load(std::memory_order_relaxed);;) {
      const int64_t front = int64_t(ends & UINT32_MAX), back = int64_t(ends >> 32), left = last - first - front - back;
      if (left <= 0) return {};
      const int64_t few = from_back && left % least ? left % least : least;  // so that fronts stay multiples
      const int64_t count = std::min(left, from_back ? few + left / 4 / least * least : std::max(least, left / 4 / least * least));
      if (!taken.ends.compare_exchange_weak(ends, ends + (uint64_t(count) << (from_back ? 32 : 0)), std::memory_order_relaxed)) continue;
      return from_back ? Piece{last - back - count, last - back} : Piece{first + front, first + front + count};
    }
  }
  void wait(const std::atomic<int64_t>& done, int64_t count) {
    for (int spins = 0; spins < SPINS; ++spins) {
      if (done.load(std::memory_order_acquire) >= count) return;
#ifdef RETRO_X86
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    }
    while (done.load(std::memory_order_acquire) < count) std::this_thread::sleep_for(std::chrono::microseconds(5));
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
  int64_t threads_;
  std::unique_ptr<Done[]> done_;
  std::unique_ptr<Taken[]> taken_;
  std::atomic<int64_t> entered_{0};
  std::atomic<bool> has_failed_{false};
  std::exception_ptr error_;
};

}  // namespace retro
