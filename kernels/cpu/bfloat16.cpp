// The C face of bfloat16 layers: code paths of this CPU, packing, and one call for one layer.
#include "bfloat16.h"
#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include "scratch.h"
#include "threads.h"
#include "tiles.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

using namespace bfloat16;

constexpr int MAX_THREADS = 1024;

struct Choice {
  const Path* path;
  bool wide;   // needs AVX512-BF16
  bool tiles;  // needs AMX
};
const Choice PATHS[] = {  // best first
#if defined(__x86_64__)
#if !defined(WITHOUT_BFLOAT16_AMX)
    {&AMX_PATH, true, true},
#endif
#if !defined(WITHOUT_BFLOAT16_AVX512)
    {&AVX512_PATH, true, false},
#endif
#if !defined(WITHOUT_BFLOAT16_AVX2)
    {&AVX2_PATH, false, false},
#endif
#endif
    {nullptr, false, false},
};

bool supported(bool wide, bool tiles) {
#if defined(__x86_64__)
  __builtin_cpu_init();  // these tests include whether the operating system saves the wide registers
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return false;
  if (tiles && !may_use_tiles(TILES_OF_BFLOAT16)) return false;
  return !wide || (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                   __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1));
#else
  return false;
#endif
}

template <class Work>
void each_panel(int64_t n, Work work) {
  std::atomic<int64_t> next{0};
  auto body = [&](int, int) {
    for (int64_t panel; (panel = next++) < (n + PANEL - 1) / PANEL;) work(panel);
  };
  parallel(max_threads(), body);
}

// weight: bfloat16 [n, k]; to: one panel [steps, 128].
void pack_panel(const uint16_t* weight, int64_t n, int64_t k, int64_t panel, uint16_t* to) {
  for (int64_t step = 0; step < (k + 1) / STEP; ++step)
    for (int64_t channel = 0; channel < PANEL; ++channel)
      for (int64_t i = 0; i < STEP; ++i) {
        const int64_t row = panel * PANEL + channel, input = step * STEP + i;
        *to++ = row < n && input < k ? weight[row * k + input] : 0;
      }
}

// work(panel, its plain layout, number of values). 0, or 1 when memory is short.
template <class Work>
int each_packed_panel(const void* weight, int64_t n, int64_t k, Work work) {
  const int64_t values = (k + 1) / STEP * VALUES;
  std::atomic<int> failed{0};
  each_panel(n, [&](int64_t panel) {
    const std::unique_ptr<uint16_t[]> plain(new (std::nothrow) uint16_t[size_t(values)]);
    if (!plain) return failed.store(1);
    pack_panel(static_cast<const uint16_t*>(weight), n, k, panel, plain.get());
    work(panel, plain.get(), values);
  });
  return failed;
}

thread_local Scratch scratch;
thread_local std::unique_ptr<Share[]> shares;

// A token as the path wants it; padded inputs are 0.
void lay_out(const uint16_t* x, int64_t k, int64_t padded, int64_t element, char* to) {
  if (element == 2) {
    std::memcpy(to, x, size_t(k) * 2);
    std::memset(to + k * 2, 0, size_t(padded - k) * 2);
    return;
  }
  for (int64_t i = 0; i < padded; ++i) {
    const uint32_t bits = i < k ? uint32_t(x[i]) << 16 : 0;
    std::memcpy(to + i * 4, &bits, 4);
  }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

const char* qtk_bfloat16_path_name(int path) { return PATHS[path].path ? PATHS[path].path->name : nullptr; }

int qtk_bfloat16_path_supported(int path) { return supported(PATHS[path].wide, PATHS[path].tiles); }

// weight: bfloat16 [n, k]; out: [panels, steps, 256], see bfloat16.h.
void qtk_bfloat16_pack(const void* weight, int64_t n, int64_t k, void* out) {
  const int64_t steps = (k + 1) / STEP;
  each_panel(n, [&](int64_t panel) {
    pack_panel(static_cast<const uint16_t*>(weight), n, k, panel, static_cast<uint16_t*>(out) + panel * steps * VALUES);
  });
}

// What a weight is compressed with: tables uint8 [panels, 16], the commonest upper bytes, and counts [panels] of the values
// that have others. 0, or 1 when memory is short.
int qtk_bfloat16_survey(const void* weight, int64_t n, int64_t k, uint8_t* tables, int64_t* counts) {
  return each_packed_panel(weight, n, k, [&](int64_t panel, const uint16_t* plain, int64_t values) {
    int64_t seen[256] = {};
    for (int64_t i = 0; i < values; ++i) ++seen[plain[i] >> 8];
    uint8_t upper[256];
    std::iota(upper, upper + 256, uint8_t(0));
    std::stable_sort(upper, upper + 256, [&](uint8_t a, uint8_t b) { return seen[a] > seen[b]; });
    std::memcpy(tables + panel * ENTRIES, upper, size_t(ENTRIES));
    counts[panel] = values;
    for (int i = 0; i < ENTRIES; ++i) counts[panel] -= seen[upper[i]];
  });
}

// tables as from qtk_bfloat16_survey, starts [panels + 1] its counts added up; out: [panels, steps, 192] and
// rest [starts[panels]], see bfloat16.h. 0, or 1 when memory is short.
int qtk_bfloat16_compress(const void* weight, int64_t n, int64_t k, const uint8_t* tables, const int64_t* starts,
                          uint8_t* out, int64_t* rest) {
  return each_packed_panel(weight, n, k, [&](int64_t panel, const uint16_t* plain, int64_t values) {
    int number[256];
    std::fill(number, number + 256, -1);
    for (int i = 0; i < ENTRIES; ++i) number[tables[panel * ENTRIES + i]] = i;
    uint8_t* to = out + panel * (values / VALUES) * COMPRESSED_BYTES;
    std::memset(to, 0, size_t(values / VALUES * COMPRESSED_BYTES));
    int64_t* left = rest + starts[panel];
    for (int64_t i = 0; i < values; ++i) {
      const int64_t half = i % VALUES / 64, word = i % 64 / 32, value = i % 32;
      const int64_t place = value / 8 * 16 + word * 8 + value % 8;
      uint8_t* step = to + i / VALUES * COMPRESSED_BYTES;
      const int found = number[plain[i] >> 8];
      step[half * 64 + place] = uint8_t(plain[i]);
      step[128 + place] |= uint8_t(std::max(found, 0) << 4 * half);
      if (found < 0) *left++ = i << 16 | plain[i];
    }
  });
}

// y [m, n] = x [m, k] weight^T + bias, all bfloat16; tables, starts and rest of a compressed weight, or null. 0, or 1
// when memory is short.
int qtk_bfloat16_linear(int path, const void* x, int64_t x_stride, int64_t m, int64_t k, int64_t n, const void* weight,
                        const uint8_t* tables, const int64_t* starts, const int64_t* rest, const void* bias, void* y) {
  if (m == 0 || n == 0) return 0;
  const Path& own = *PATHS[path].path;
  Job job{};
  job.n = n, job.steps = (k + 1) / STEP;
  job.x_step = STEP * own.element;
  // One line more than needed: tokens a power of two apart would meet in the same few cache sets.
  job.x_stride = (job.steps * job.x_step + 63) / 64 * 64 + 64;
  job.weight = static_cast<const char*>(weight), job.bias = static_cast<const uint16_t*>(bias);
  job.tables = tables, job.starts = starts, job.rest = rest;
  job.y = static_cast<uint16_t*>(y);
  char* tokens = scratch.take(size_t(m * job.x_stride));
  if (!tokens) return 1;
  for (int64_t token = 0; token < m; ++token)
    lay_out(static_cast<const uint16_t*>(x) + token * x_stride, k, job.steps * STEP, own.element,
            tokens + token * job.x_stride);
  job.x = tokens;
  const int64_t panels = (n + PANEL - 1) / PANEL;
  const int threads = int(std::min<int64_t>(std::min(max_threads(), MAX_THREADS), panels));
  if (!shares) shares.reset(new Share[MAX_THREADS]);
  Share* share = shares.get();
  for (int i = 0; i < threads; ++i) share[i].set(uint64_t(panels * i / threads), uint64_t(panels * (i + 1) / threads));
  auto body = [&](int thread, int) {
    auto work = [&](int64_t panel) {
      for (int64_t first = 0; first < m; first += MOST_TOKENS)
        own.multiply(job, panel, first, std::min(m, first + MOST_TOKENS));
    };
    for (int64_t panel; (panel = share[thread].take()) >= 0;) work(panel);
    for (int victim = 0; victim < threads; ++victim)
      for (int64_t panel; (panel = share[victim].steal()) >= 0;) work(panel);
  };
  parallel(threads, body);
  return 0;
}

}
#pragma GCC visibility pop
