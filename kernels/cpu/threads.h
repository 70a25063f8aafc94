// Threads come from the OpenMP runtime that torch has loaded, so torch.set_num_threads and an engine's core binding
// hold, and no second pool appears. Its entry points are weak symbols: nothing is linked, the process's own runtime
// (GNU's, or LLVM's/Intel's, which answers to the same names) is found at load; without one, work runs on the caller.
#pragma once
#include <atomic>
#include <cstdint>

extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
__attribute__((weak)) void GOMP_barrier();
__attribute__((weak)) int omp_get_max_threads();
__attribute__((weak)) int omp_get_num_threads();
__attribute__((weak)) int omp_get_thread_num();
__attribute__((weak)) int omp_in_parallel();
}

inline bool have_openmp() {
  return GOMP_parallel && GOMP_barrier && omp_get_max_threads && omp_get_num_threads && omp_get_thread_num &&
         omp_in_parallel;
}

inline int max_threads() { return have_openmp() && !omp_in_parallel() ? omp_get_max_threads() : 1; }

// Run body(thread, threads) on `threads` threads at most; the runtime may give fewer.
template <class Body>
void parallel(int threads, Body& body) {
  if (threads <= 1) return body(0, 1);
  GOMP_parallel([](void* data) { (*static_cast<Body*>(data))(omp_get_thread_num(), omp_get_num_threads()); }, &body,
                unsigned(threads), 0);
}

inline void barrier(int threads) {
  if (threads > 1) GOMP_barrier();
}

// A thread's share of the tasks 0..n: it takes from the front, threads that have finished steal from the back. So
// each streams through its own stretch of the weights, and a thread that the machine slows down is relieved.
struct alignas(64) Share {
  std::atomic<uint64_t> range{0};  // first | end << 32

  void set(uint64_t first, uint64_t end) { range.store(first | end << 32, std::memory_order_relaxed); }

  int64_t take() {
    uint64_t now = range.load(std::memory_order_relaxed);
    while (uint32_t(now) < now >> 32)
      if (range.compare_exchange_weak(now, now + 1, std::memory_order_relaxed)) return int64_t(uint32_t(now));
    return -1;
  }

  int64_t steal() {
    uint64_t now = range.load(std::memory_order_relaxed);
    while (uint32_t(now) < now >> 32)
      if (range.compare_exchange_weak(now, now - (uint64_t(1) << 32), std::memory_order_relaxed))
        return int64_t((now >> 32) - 1);
    return -1;
  }
};
