// Runs attention on random batches whose buffers end where the next page may not be touched.
//
// Compiled with AddressSanitizer and UndefinedBehaviorSanitizer. Values are all 1 where a token is and NaN elsewhere, so
// every result must be 1: the weights of a row sum to one, and nothing that is no token of the sequence takes part.
#include <sys/mman.h>
#include <unistd.h>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>
#include "job.h"

extern "C" {
int qta_may_use_tiles();
int qta_supported();
int qta_attend(const Attention* call);
int qta_step(const Attention* call, const Bfloat16* key, int64_t key_stride, const Bfloat16* value, int64_t value_stride,
             const int64_t* slots);
}

namespace {

constexpr Bfloat16 ONE = 0x3f80, NOT_A_NUMBER = 0x7fc0;
std::mt19937 random_bits(1);
int64_t upto(int64_t most) { return int64_t(random_bits() % uint64_t(most + 1)); }
Bfloat16 number() { return Bfloat16((0x3f80 - 128 * upto(4)) | (upto(1) << 15)); }  // up to 1 in magnitude

template <class T>
struct Guarded {  // `count` numbers that end at a page nobody may touch
  char* map;
  size_t whole;
  T* data;

  Guarded(int64_t count, T value) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), bytes = size_t(count) * sizeof(T);
    whole = (bytes + page - 1) / page * page + page;
    map = static_cast<char*>(mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (map == MAP_FAILED || mprotect(map + whole - page, page, PROT_NONE)) std::abort();
    data = reinterpret_cast<T*>(map + whole - page - bytes);
    for (int64_t i = 0; i < count; ++i) data[i] = value;
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(map, whole); }
};

float as_float(Bfloat16 value) {
  const uint32_t bits = uint32_t(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

void run() {
  const int64_t dim = 32 * (1 + upto(4)), page = 32 * (1 + upto(2)), key_heads = 1 + upto(2);
  const int64_t heads = key_heads * (1 + upto(8)), sequences = 1 + upto(3);
  std::vector<int32_t> starts{0}, lengths;
  int64_t most = 1;
  for (int64_t i = 0; i < sequences; ++i) {
    const int64_t queries = upto(70), length = std::max<int64_t>(1, queries + upto(300));
    starts.push_back(int32_t(starts.back() + queries)), lengths.push_back(int32_t(length));
    most = std::max(most, (length + page - 1) / page);
  }
  const int64_t tokens = starts.back(), size = 2 * page * dim;
  Guarded<Bfloat16> query(tokens * heads * dim, 0), output(tokens * heads * dim, NOT_A_NUMBER);
  Guarded<Bfloat16> cache(sequences * most * key_heads * size, NOT_A_NUMBER);
  Guarded<int32_t> table(sequences * most, 0), first(sequences + 1, 0), long_as(sequences, 0);
  for (int64_t i = 0; i < tokens * heads * dim; ++i) query.data[i] = number();
  for (int64_t i = 0; i <= sequences; ++i) first.data[i] = starts[size_t(i)];
  for (int64_t s = 0; s < sequences; ++s) {
    long_as.data[s] = lengths[size_t(s)];
    for (int64_t i = 0; i < most; ++i) table.data[s * most + i] = int32_t(sequences * most - 1 - (s * most + i));
    for (int64_t t = 0; t < lengths[size_t(s)]; ++t)
      for (int64_t h = 0; h < key_heads; ++h) {
        Bfloat16* own = cache.data + (table.data[s * most + t / page] * key_heads + h) * size;
        for (int64_t d = 0; d < dim; ++d)
          own[d * page + t % page] = number(), own[page * dim + t % page * dim + d] = ONE;
      }
  }
  const Attention call{query.data, output.data, cache.data, cache.data + page * dim, table.data, first.data, long_as.data,
                       heads * dim, heads * dim, key_heads * size, size, most, sequences, heads, key_heads, dim, page, 0.125,
                       qta_may_use_tiles() && upto(1)};
  // Half of the time new tokens come with their keys and values, which the call puts into the cache.
  const int64_t wide = key_heads * dim;
  Guarded<Bfloat16> key(tokens * wide, 0), value(tokens * wide, ONE);
  Guarded<int64_t> slots(tokens, -1);
  const bool given = upto(1);
  for (int64_t s = 0; given && s < sequences; ++s)
    for (int64_t i = first.data[s]; i < first.data[s + 1]; ++i) {
      const int64_t t = long_as.data[s] - first.data[s + 1] + i, own = table.data[s * most + t / page];
      slots.data[i] = own * page + t % page;
      for (int64_t h = 0; h < key_heads; ++h) {
        Bfloat16* to = cache.data + (own * key_heads + h) * size;
        for (int64_t d = 0; d < dim; ++d)
          key.data[i * wide + h * dim + d] = number(), to[d * page + t % page] = to[page * dim + t % page * dim + d] = NOT_A_NUMBER;
      }
    }
  if (given ? qta_step(&call, key.data, wide, value.data, wide, slots.data) : qta_attend(&call)) std::exit(1);
  for (int64_t i = 0; i < tokens * heads * dim; ++i)
    if (!(std::abs(as_float(output.data[i]) - 1) < 0.01)) {
      std::printf("result %ld of %ld is %g\n", long(i), long(tokens * heads * dim), double(as_float(output.data[i])));
      std::exit(1);
    }
}

}  // namespace

int main() {
  if (!qta_supported()) {
    std::puts("this CPU cannot");
    return 0;
  }
  for (int i = 0; i < 200; ++i) run();
  std::puts("200 runs");
}
