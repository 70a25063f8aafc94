// How weights that are used once come from memory: software prefetches, some KB ahead of what is multiplied.
//
// On AMD's CPUs `prefetchnta` fills L1 alone, so the stream pushes nothing out of L2. On Intel's it brings a core 6 of the 19
// GB/s that `prefetcht0` does (Granite Rapids), so there lines go through L2. Loops that only stream bring them into it from
// FAR_AHEAD and out of it from NEAR_AHEAD, which is faster than either alone; those that do more besides, from one distance.
// Whatever else misses L1 there needs one of the 16 buffers that hold a core's lines on their way, and keeps the stream
// waiting: results are stored past the caches, see rows.h.
// Everything has internal linkage, as in rows.h.
#pragma once
#include <cstdint>

#if defined(__x86_64__)
// Whether weights are brought into L1 alone.
static inline bool past_l2() {
  static const bool amd = (__builtin_cpu_init(), __builtin_cpu_is("amd"));
  return amd;
}
#else
static inline bool past_l2() { return false; }
#endif

// Bytes that a tile which is alone on its panel fetches ahead of itself: with one prefetch a line, and with two.
static inline int64_t stream_ahead() { return past_l2() ? 4096 : 2048; }
constexpr int64_t NEAR_AHEAD = 768, FAR_AHEAD = 4096;
