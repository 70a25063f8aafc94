// The library's C face: tiles of outputs, or some rows, shared out among threads.
#include <algorithm>
#include <atomic>
#include "../threads.h"
#include "job.h"

namespace {

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif
bool always() { return true; }

// Best first. A compiler that does not know an instruction set leaves its path out.
const struct Choice {
  const char* name;
  const ColumnLoops* columns;
  const GridLoops* grids;
  bool (*supported)();
} CHOICES[] = {
#if defined(__x86_64__) && !defined(WITHOUT_COLUMNS_AVX512)
    {"avx512", &AVX512_COLUMNS, &AVX512_GRIDS, has_avx512},
#endif
#if defined(__x86_64__) && !defined(WITHOUT_COLUMNS_AVX2)
    {"avx2", &AVX2_COLUMNS, &AVX2_GRIDS, has_avx2},
#endif
    {"portable", &PORTABLE_COLUMNS, &PORTABLE_GRIDS, always},
};
constexpr int COUNT = int(sizeof(CHOICES) / sizeof(CHOICES[0]));

// Outputs 0..n, `size` at a time.
template <class Job>
void run(const Job& job, int64_t n, int64_t size, void (*tile)(const Job&, int64_t, int64_t)) {
  const int64_t tiles = (n + size - 1) / size;
  std::atomic<int64_t> next{0};
  auto body = [&](int, int) {
    for (int64_t i; (i = next.fetch_add(1)) < tiles;) tile(job, i * size, std::min(size, n - i * size));
  };
  parallel(int(std::min<int64_t>(tiles / 2, max_threads())), body);
}

}  // namespace

#define PUBLIC extern "C" __attribute__((visibility("default")))

PUBLIC const char* qtr_path_name(int path) { return path < COUNT ? CHOICES[path].name : nullptr; }

PUBLIC int qtr_path_supported(int path) {
#if defined(__x86_64__)
  __builtin_cpu_init();  // these tests include whether the operating system saves the wide registers
#endif
  return CHOICES[path].supported();
}

PUBLIC void qtr_round(int path, const Rounding* job) { run(*job, job->n, LANES, CHOICES[path].columns->round); }

PUBLIC void qtr_descend(int path, const Descent* job) { run(*job, job->n, LANES, CHOICES[path].columns->descend); }

PUBLIC void qtr_nearest(int path, const Nearest* job) { run(*job, job->grid.n, ROWS, CHOICES[path].grids->nearest); }

PUBLIC void qtr_trials(int path, const Trials* job) { run(*job, job->grid.n, ROWS, CHOICES[path].grids->trials); }
