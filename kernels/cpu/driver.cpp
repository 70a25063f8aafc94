// The library's C face: which paths this CPU has, packing of weights, and one call for one linear layer.
#include <sys/mman.h>
#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include "job.h"
#include "scratch.h"
#include "stream.h"
#include "threads.h"
#include "tiles.h"
#if defined(__x86_64__)
#include <cpuid.h>
#include <xmmintrin.h>
#endif

namespace {

constexpr int64_t MANY_ROWS = 96;  // from here on tasks are several panels, where a path wants that
constexpr int64_t SERIAL_CODES = 1 << 13;  // fewer activations than this are quantized before the threads are woken
constexpr int64_t GATE_COST = 6;  // silu(gate) * up takes as long as quantizing this many activations
constexpr int MAX_THREADS = 1024;

#if defined(__x86_64__)
// Best first. A compiler that does not know an instruction set leaves its path out.
enum Need { AMX, AVX512, AVXVNNI, AVX2, NOTHING };
struct Choice {
  const Path* path;
  Need need;
};
const Choice PATHS[] = {
#if !defined(WITHOUT_AVX512) && !defined(WITHOUT_AMX)
    {&AMX_PATH, AMX},
#endif
#if !defined(WITHOUT_AVX512)
    {&AVX512_PATH, AVX512},
#endif
#if !defined(WITHOUT_AVXVNNI)
    {&AVXVNNI_PATH, AVXVNNI},
#endif
#if !defined(WITHOUT_AVX2)
    {&AVX2_PATH, AVX2},
#endif
    {&PORTABLE_PATH, NOTHING},
};

bool supported(int path) {
  __builtin_cpu_init();  // these tests include whether the operating system saves the wide registers
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
  const bool avx512 = avx2 && f16c && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  switch (PATHS[path].need) {
    case AMX: return avx512 && may_use_tiles(TILES_OF_INT8);
    case AVX512: return avx512;
    case AVXVNNI: return avx2 && f16c && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
    case AVX2: return avx2 && f16c;
    default: return true;
  }
}
#else
struct Choice {
  const Path* path;
};
const Choice PATHS[] = {{&PORTABLE_PATH}};
bool supported(int) { return true; }
#endif
constexpr int PATH_COUNT = int(sizeof(PATHS) / sizeof(PATHS[0]));

thread_local Scratch scratch;
thread_local std::unique_ptr<Share[]> shares;

// Results that went past the caches (see rows.h) are seen by others from here on.
void fence_stores() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

void run_block(const Path& path, const Job& job, int threads) {
  const int64_t panels = round_up(job.n, PANEL) / PANEL;
  // Enough tasks for every thread: when panels are few, rows are split too (in multiples of the largest tile).
  const int64_t span = job.m < MANY_ROWS ? 1 : std::clamp<int64_t>(panels / (4 * threads), 1, path.span);
  const int64_t spans = (panels + span - 1) / span;
  const int64_t wanted = threads == 1 ? 1 : std::max<int64_t>(1, 4 * threads / spans);
  const int64_t chunk = std::max(path.rows, round_up((job.m + wanted - 1) / wanted, path.rows));
  const int64_t chunks = (job.m + chunk - 1) / chunk, tasks = spans * chunks;
  threads = int(std::min<int64_t>(threads, tasks));
  const bool serial = job.m == 1 || job.m * job.k * (job.gated ? GATE_COST : 1) <= SERIAL_CODES;
  if (serial) path.quantize(job, 0, job.m);
  if (!shares) shares.reset(new Share[MAX_THREADS]);
  Share* share = shares.get();
  for (int i = 0; i < threads; ++i) share[i].set(uint64_t(tasks * i / threads), uint64_t(tasks * (i + 1) / threads));
  auto body = [&](int thread, int given) {
    if (!serial) {
      path.quantize(job, job.m * thread / given, job.m * (thread + 1) / given);
      barrier(given);
    }
    auto work = [&](int64_t task, int64_t next) {
      const int64_t first = task % chunks * chunk, panel = task / chunks * span;
      path.multiply(job, panel, std::min(span, panels - panel), first, std::min(job.m, first + chunk), next);
    };
    for (int64_t task; (task = share[thread].take()) >= 0;)
      work(task, (task + 1) / chunks < spans ? (task + 1) / chunks * span : -1);
    for (int victim = 0; victim < threads; ++victim)
      for (int64_t task; (task = share[victim].steal()) >= 0;) work(task, -1);
    fence_stores();
  };
  parallel(threads, body);
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

const char* qtk_path_name(int path) { return path >= 0 && path < PATH_COUNT ? PATHS[path].path->name : nullptr; }

int qtk_path_supported(int path) { return path >= 0 && path < PATH_COUNT && supported(path); }

int qtk_threads() { return have_openmp() ? omp_get_max_threads() : 0; }

// Ask for 2 MB pages under [data, data + bytes): fewer TLB misses while weights stream. Failure only costs speed.
void qtk_advise(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t page = 1 << 21, first = (uintptr_t(data) + page - 1) / page * page;
  const uintptr_t last = (uintptr_t(data) + uintptr_t(bytes)) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// packed: int32 [n, words], eight nibbles a word, low nibble first; out: [panels, steps, 128], see job.h.
void qtk_pack(const int32_t* packed, int64_t words, int64_t n, int64_t k, uint8_t* out) {
  const int64_t steps = round_up(k, 4) / 4, panels = round_up(n, PANEL) / PANEL;
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(packed);  // four nibbles: one step of one channel
  std::atomic<int64_t> next{0};
  auto body = [&](int, int) {
    for (int64_t panel; (panel = next++) < panels;) {
      uint8_t* block = out + panel * steps * STEP_BYTES;
      for (int64_t slot = 0; slot < 32; ++slot) {  // 16 lanes of two 64-byte words
        const int64_t low = panel * PANEL + slot / 16 * 32 + slot % 16, high = low + 16;
        for (int64_t step = 0; step < steps; ++step) {
          const uint32_t l = low < n ? halves[low * words * 2 + step] : 0x8888;
          const uint32_t h = high < n ? halves[high * words * 2 + step] : 0x8888;
          for (int b = 0; b < 4; ++b)
            block[step * STEP_BYTES + slot * 4 + b] = uint8_t((l >> 4 * b & 15) | (h >> 4 * b & 15) << 4);
        }
      }
    }
  };
  parallel(max_threads(), body);
}

// y = linear(x), or of silu(gate) * up when `gated`, see ops; dtypes are those of job.h. 0, or 1 when memory is short.
int qtk_linear(int path, const void* x, int64_t x_stride, int dtype, int gated, int64_t m, int64_t k, int64_t n,
               int64_t group_size, const void* weight, const void* scales, int scale_dtype, const void* bias,
               int bias_dtype, void* y) {
  if (m == 0) return 0;
  Job job{};
  job.gated = gated, job.x_stride = x_stride, job.dtype = Dtype(dtype), job.k = k, job.n = n;
  job.steps = round_up(k, 4) / 4;
  job.group_steps = group_size < 0 ? std::max<int64_t>(job.steps, 1) : group_size / 4;
  job.groups = group_size < 0 ? 1 : round_up(job.steps, job.group_steps) / job.group_steps;
  job.weight = static_cast<const uint8_t*>(weight);
  job.scales = static_cast<const char*>(scales), job.scale_dtype = Dtype(scale_dtype);
  job.bias = static_cast<const char*>(bias), job.bias_dtype = Dtype(bias_dtype);
  // One line more than needed: rows a power of two apart would meet in the same few cache sets.
  job.code_stride = round_up(job.steps * 4, 64) + 64;
  const Path& chosen = *PATHS[path].path;
  const int64_t element = job.dtype == FLOAT32 ? 4 : 2, rows = std::min(chosen.block, round_up(m, chosen.rows));
  const int64_t codes = rows * job.code_stride, starts = round_up(rows * job.groups * 8, 64);
  char* memory = scratch.take(size_t(codes + starts + rows * 8));
  if (!memory) return 1;
  job.codes = reinterpret_cast<int8_t*>(memory);
  job.starts = reinterpret_cast<int32_t*>(memory + codes);
  job.wholes = reinterpret_cast<int32_t*>(memory + codes + starts);
  job.token_scales = reinterpret_cast<float*>(job.wholes + rows);
  const int threads = std::min(max_threads(), MAX_THREADS);
  for (int64_t first = 0; first < m; first += chosen.block) {
    job.m = std::min(chosen.block, m - first);
    job.x = static_cast<const char*>(x) + first * x_stride * element;
    job.y = static_cast<char*>(y) + first * n * element;
    run_block(chosen, job, threads);
  }
  return 0;
}

// The arguments of a call of qtk_linear that is repeated, see repeat.py.
struct Linear {
  int path;
  const void* x;
  int64_t x_stride;
  int dtype, gated;
  int64_t m, k, n, group_size;
  const void *weight, *scales;
  int scale_dtype;
  const void* bias;
  int bias_dtype;
  void* y;
};

int qtk_linear_again(const Linear* call) {
  return qtk_linear(call->path, call->x, call->x_stride, call->dtype, call->gated, call->m, call->k, call->n,
                    call->group_size, call->weight, call->scales, call->scale_dtype, call->bias, call->bias_dtype, call->y);
}

// Read `bytes` once with all threads, each its own stretch, as the product does at one token; returns seconds.
double qtk_read(const void* data, int64_t bytes) {
  const char* from = static_cast<const char*>(data);
  auto body = [&](int thread, int threads) {
    const int64_t first = bytes / 64 * thread / threads, last = bytes / 64 * (thread + 1) / threads;
    uint64_t seen = 0;
    for (int64_t line = first; line < last; ++line) {
      if (past_l2()) __builtin_prefetch(from + line * 64 + stream_ahead());
      else __builtin_prefetch(from + line * 64 + FAR_AHEAD, 0, 2), __builtin_prefetch(from + line * 64 + NEAR_AHEAD);
      uint64_t words[8];
      std::memcpy(words, from + line * 64, 64);
      seen ^= words[0] ^ words[1] ^ words[2] ^ words[3] ^ words[4] ^ words[5] ^ words[6] ^ words[7];
    }
    asm volatile("" : : "r"(seen));
  };
  const auto start = std::chrono::steady_clock::now();
  parallel(max_threads(), body);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Operations a second of the path's dot products alone, on all threads; 0 where the path has none of its own.
double qtk_dot_peak(int path, int64_t rounds) {
  const Path& chosen = *PATHS[path].path;
  if (!chosen.peak) return 0;
  std::atomic<double> operations{0};
  auto body = [&](int, int) {
    const double own = chosen.peak(rounds);
    for (double before = operations; !operations.compare_exchange_weak(before, before + own);) {}
  };
  const auto start = std::chrono::steady_clock::now();
  parallel(max_threads(), body);
  return operations / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}
#pragma GCC visibility pop
