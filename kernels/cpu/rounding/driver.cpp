// The library's C face: tiles of outputs, or some rows, shared out among threads.
#include <algorithm>
#include <atomic>
#include <vector>
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
  const LayerLoops* layers;
  const AttentionLoops* attention;
  bool (*supported)();
} CHOICES[] = {
#if defined(__x86_64__) && !defined(WITHOUT_COLUMNS_AVX512)
    {"avx512", &AVX512_COLUMNS, &AVX512_GRIDS, &AVX512_LAYERS, &AVX512_ATTENTION, has_avx512},
#endif
#if defined(__x86_64__) && !defined(WITHOUT_COLUMNS_AVX2)
    {"avx2", &AVX2_COLUMNS, &AVX2_GRIDS, &AVX2_LAYERS, &AVX2_ATTENTION, has_avx2},
#endif
    {"portable", &PORTABLE_COLUMNS, &PORTABLE_GRIDS, &PORTABLE_LAYERS, &PORTABLE_ATTENTION, always},
};
constexpr int COUNT = int(sizeof(CHOICES) / sizeof(CHOICES[0]));

const struct {
  const char* name;
  const SumLoops* loops;
} SUMS[] = {
#if defined(__x86_64__) && !defined(WITHOUT_SUMS_AMX)
    {"amx", &AMX_SUMS},
#endif
#if defined(__x86_64__) && !defined(WITHOUT_SUMS_VNNI)
    {"avx512", &VNNI_SUMS},
#endif
    {nullptr, nullptr},
};
constexpr int SUMS_COUNT = int(sizeof(SUMS) / sizeof(SUMS[0])) - 1;
#if defined(__x86_64__) && !defined(WITHOUT_SWEEPS_VNNI)
const SweepLoops& SWEEPS = VNNI_SWEEPS;
bool has_sweeps() { return SWEEPS.supported(); }
#else
const SweepLoops SWEEPS{};
bool has_sweeps() { return false; }
#endif
constexpr int64_t MANY = 8;  // blocks of a total for every thread: enough for blocks to be large

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

// Tasks 0..n, one at a time.
template <class Task>
void share(int64_t n, const Task& task) {
  std::atomic<int64_t> next{0};
  auto body = [&](int, int) {
    for (int64_t i; (i = next.fetch_add(1)) < n;) task(i);
  };
  parallel(int(std::min<int64_t>(n, max_threads())), body);
}

int64_t blocks(int64_t lines, int64_t size) { return (lines + size - 1) / size; }

// A total's blocks, one after another as threads take them. Where threads pack columns themselves a block has many rows.
struct Tasks {
  int64_t m, n, rows = SUMS_AT_ONCE, columns = SUMS_AT_ONCE;

  Tasks(const Sum& job, bool packing) : m(job.left.lines), n(job.right.lines) {
    const int64_t threads = max_threads();
    if (!packing) return;
    if (blocks(n, SUMS_COLUMNS) >= MANY * threads) columns = SUMS_COLUMNS;
    const int64_t down = blocks(2 * threads, std::max<int64_t>(1, blocks(n, columns)));  // so that no thread waits long
    rows = std::max(rows, blocks(blocks(m, down), SUMS_AT_ONCE) * SUMS_AT_ONCE);
  }
  int64_t count() const { return blocks(m, rows) * blocks(n, columns); }
  Part rows_of(int64_t i) const { return part(i % blocks(m, rows), rows, m); }
  Part columns_of(int64_t i) const { return part(i / blocks(m, rows), columns, n); }

 private:
  static Part part(int64_t i, int64_t size, int64_t end) { return {i * size, std::min(size, end - i * size)}; }
};

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

PUBLIC void qtr_restore(int path, const Restored* job) { run(*job, job->n, ROWS, CHOICES[path].grids->restore); }

PUBLIC void qtr_norm(int path, const Norm* job) { run(*job, job->n, ROWS, CHOICES[path].layers->norm); }

PUBLIC void qtr_gate(int path, const Gate* job) { run(*job, job->count, GATED, CHOICES[path].layers->gate); }

PUBLIC int64_t qtr_attention_scratch(int path, const Attention* job) { return CHOICES[path].attention->scratch(*job); }

PUBLIC void qtr_attend(int path, const Attention* job) {
  const AttentionLoops& loops = *CHOICES[path].attention;
  const int64_t parts = (job->length + QUERIES - 1) / QUERIES, heads = job->sequences * job->heads;
  share(job->sequences * job->sources, [&](int64_t i) { loops.pack(*job, i); });
  share(parts * heads, [&](int64_t i) {  // those with the most keys first
    const int64_t head = i % heads;
    loops.attend(*job, head / job->heads, head % job->heads, (parts - 1 - i / heads) * QUERIES);
  });
}

PUBLIC const char* qtr_sums_name(int path) { return path < SUMS_COUNT ? SUMS[path].name : nullptr; }

PUBLIC int qtr_sums_supported(int path) {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  return SUMS[path].loops->supported();
}

PUBLIC int64_t qtr_sums_scratch(int path, const Sum* job) {
  const SumLoops& loops = *SUMS[path].loops;
  return loops.scratch(*job, std::min(job->steps, SUMS_STEPS)) + loops.own * max_threads();
}

PUBLIC void qtr_sum(int path, const Sum* given) {
  const SumLoops& loops = *SUMS[path].loops;
  const Sum& job = *given;
  const Tasks tasks(job, loops.own > 0);
  const int64_t passes = blocks(job.steps, SUMS_STEPS);
  std::vector<std::atomic<int64_t>> next(size_t(2 * passes));  // tasks of every pass, to pack and to multiply
  char* const desks = job.scratch + loops.scratch(job, std::min(job.steps, SUMS_STEPS));
  auto body = [&](int thread, int threads) {
    for (int64_t pass = 0; pass < passes; ++pass) {
      Sum own = job;
      own.keep = pass ? 1.0f : job.keep;
      const int64_t step = pass * SUMS_STEPS, steps = std::min(SUMS_STEPS, job.steps - step);
      const int64_t left = loops.packs(job.left, steps);
      const int64_t right = loops.own || sums_shared(job) ? 0 : loops.packs(job.right, steps);
      for (int64_t i; (i = next[size_t(2 * pass)].fetch_add(1)) < left + right;)
        loops.pack(own, i >= left, i < left ? i : i - left, step, steps);
      barrier(threads);
      for (int64_t i; (i = next[size_t(2 * pass + 1)].fetch_add(1)) < tasks.count();) {
        const Part rows = tasks.rows_of(i), columns = tasks.columns_of(i);
        if (sums_wanted(job, rows.first, rows.count, columns.first, columns.count))
          loops.multiply(own, desks + thread * loops.own, rows, columns, {step, steps});
      }
      if (pass + 1 < passes) barrier(threads);
    }
  };
  parallel(int(std::min<int64_t>(tasks.count(), max_threads())), body);
}

PUBLIC int qtr_sweeps_supported() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  return has_sweeps();
}

PUBLIC int64_t qtr_sweep_bytes(const Swept* matrix) { return SWEEPS.bytes(*matrix); }

PUBLIC void qtr_sweep_pack(const Swept* matrix) {
  share((matrix->factor.lines + 15) / 16, [&](int64_t tile) { SWEEPS.pack(*matrix, tile); });
}

PUBLIC int64_t qtr_sweep_scratch(const Sweep* job) { return SWEEPS.scratch(*job) * max_threads(); }

PUBLIC void qtr_sweep(int path, const Sweep* job) {
  const auto& loops = *CHOICES[path].columns;
  const auto sweep = job->matrix->ahead ? SWEEPS.round : SWEEPS.descend;
  const int64_t threads = max_threads(), whole = (job->n + LANES - 1) / LANES;
  const int64_t size = whole % threads && whole < MANY * threads ? LANES / 2 : LANES;  // so that no thread waits long
  const int64_t parts = (job->n + size - 1) / size;
  std::atomic<int64_t> next{0};
  auto body = [&](int thread, int) {
    for (int64_t i; (i = next.fetch_add(1)) < parts;) sweep(*job, loops, thread, i * size, std::min(size, job->n - i * size));
  };
  parallel(int(std::min(parts, threads)), body);
}
