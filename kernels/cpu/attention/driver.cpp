// The library's C face: whether this CPU can run it, and one call that divides a batch's queries among torch's threads.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <new>
#include <vector>
#include "../scratch.h"
#include "../threads.h"
#include "../tiles.h"
#include "job.h"

namespace {

constexpr int64_t MOST_ROWS = 480;   // of a task: keys are brought into panels once for all of them
constexpr int64_t MOST_SUMS = 1 << 16;  // of a task, a quarter of a megabyte: they stay in L2
constexpr int64_t FEWEST_ROWS = 48;  // bringing keys into panels then costs an eighth
constexpr int64_t TASKS = 4;         // for every thread, where there is enough to do
constexpr int64_t SERIAL_WORK = 1 << 17;  // queries times keys times elements; waking threads takes as long

thread_local Scratch scratch;
thread_local std::vector<Task> tasks;

// Every sequence's queries in blocks of `count`, those that see most keys first.
void divide(const Attention& call, int64_t count) {
  tasks.clear();
  for (int64_t sequence = 0; sequence < call.sequences; ++sequence) {
    const int64_t queries = call.starts[sequence + 1] - call.starts[sequence];
    for (int64_t first = 0; first < queries; first += count) {
      const int64_t own = std::min(count, queries - first);
      for (int64_t head = 0; head < call.key_heads; ++head)
        tasks.push_back({sequence, head, first, own, call.lengths[sequence] - queries + first + own});
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.keys * a.count > b.keys * b.count; });
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int qta_supported() {
#if defined(__x86_64__) && !defined(WITHOUT_AVX512)
  __builtin_cpu_init();  // these tests include whether the operating system saves the wide registers
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16");
#else
  return 0;
#endif
}

// Whether AMX can multiply here; asks the system for its registers.
int qta_may_use_tiles() {
#if !defined(WITHOUT_AVX512) && !defined(WITHOUT_AMX)
  return qta_supported() && may_use_tiles(TILES_OF_BFLOAT16);
#else
  return 0;
#endif
}

// Returns 0, or 1 when memory is short. Only where qta_supported() says so.
int qta_attend(const Attention* call) {
#if !defined(WITHOUT_AVX512)
  int64_t work = 0;
  for (int64_t sequence = 0; sequence < call->sequences; ++sequence)
    work += (call->starts[sequence + 1] - call->starts[sequence]) * call->lengths[sequence] * call->heads * call->dim;
  const int threads = work <= SERIAL_WORK ? 1 : max_threads();
  const int64_t heads = call->heads / call->key_heads, wanted = threads == 1 ? 1 : TASKS * threads;
  int64_t count = std::max<int64_t>(1, std::min(MOST_ROWS, MOST_SUMS / call->dim) / heads);
  try {
    divide(*call, count);
    while (int64_t(tasks.size()) < wanted && count > 1 && count * heads >= 2 * FEWEST_ROWS) divide(*call, count /= 2);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  const Task* all = tasks.data();
  const int64_t number = int64_t(tasks.size()), bytes = attention_scratch(*call, count * heads);
  std::atomic<int64_t> next{0};
  std::atomic<int> failed{0};
  auto body = [&](int, int) {
    char* memory = scratch.take(size_t(bytes));
    if (!memory) failed = 1;
    else
      for (int64_t task; (task = next++) < number;) attend(*call, all[task], memory);
  };
  parallel(int(std::min<int64_t>(threads, number)), body);
  return failed;
#else
  (void)call;
  return 1;
#endif
}

// The same for a batch whose new tokens are not in the cache yet: their keys and values, [tokens, key heads, dim], are put
// there first, token t at place slots[t] % page of page slots[t] / page; nowhere if that is negative.
int qta_step(const Attention* call, const Bfloat16* key, int64_t key_stride, const Bfloat16* value, int64_t value_stride,
             const int64_t* slots) {
  for (int64_t token = 0; token < call->starts[call->sequences]; ++token) {
    if (slots[token] < 0) continue;
    const int64_t place = slots[token] % call->page, from = slots[token] / call->page * call->page_stride;
    for (int64_t head = 0; head < call->key_heads; ++head) {
      Bfloat16* keys = const_cast<Bfloat16*>(call->keys) + from + head * call->head_stride + place;
      Bfloat16* values = const_cast<Bfloat16*>(call->values) + from + head * call->head_stride + place * call->dim;
      for (int64_t d = 0; d < call->dim; ++d) keys[d * call->page] = key[token * key_stride + head * call->dim + d];
      std::memcpy(values, value + token * value_stride + head * call->dim, size_t(call->dim) * sizeof(Bfloat16));
    }
  }
  return qta_attend(call);
}

// A call of qta_step that is repeated: what belongs to the layer, and where the step finds what belongs to the batch.
struct Again {
  Attention call;
  const Bfloat16* key;
  int64_t key_stride;
  const Bfloat16* value;
  int64_t value_stride;
  const Batch* batch;
};

int qta_step_again(const Again* again) {
  const Batch& batch = *again->batch;
  Attention call = again->call;
  call.table = batch.table, call.table_stride = batch.table_stride;
  call.starts = batch.starts, call.lengths = batch.lengths;
  return qta_step(&call, again->key, again->key_stride, again->value, again->value_stride, batch.slots);
}

// Operations a second of the dot products alone, on all threads.
double qta_dot_peak(int64_t rounds) {
#if !defined(WITHOUT_AVX512)
  std::atomic<int64_t> threads{0};
  double operations = 0;
  auto body = [&](int thread, int) {
    const double own = attention_peak(rounds);
    if (thread == 0) operations = own;
    ++threads;
  };
  const auto start = std::chrono::steady_clock::now();
  parallel(max_threads(), body);
  return operations * double(threads) / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
#else
  (void)rounds;
  return 0;
#endif
}

}
#pragma GCC visibility pop
