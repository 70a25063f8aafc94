// Rows of a weight, rounded number by number. Compiled once for each instruction set; vectors are the compiler's.
#include <algorithm>
#include "job.h"
#include "vectors.h"

namespace {

// To the nearest bfloat16, even on a tie.
inline void store_halves(Vector value, uint16_t* to, int64_t count) {
  Bits bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits += 0x7fff + (bits >> 16 & 1);
  uint16_t halves[WIDTH];
  for (int64_t i = 0; i < WIDTH; ++i) halves[i] = uint16_t(uint32_t(bits[i]) >> 16);
  std::memcpy(to, halves, size_t(count) * sizeof(uint16_t));
}

template <bool TIMES, bool HALVES>
void round_row(const Nearest& job, const float* from, int64_t at) {
  const Grid& grid = job.grid;
  auto value = [&](int64_t i, int64_t count) {
    return TIMES ? load(from + i, count) * load(job.times + i, count) : load(from + i, count);
  };
  for (int64_t first = 0; first < grid.k; first += grid.size) {
    const int64_t last = std::min(grid.k, first + grid.size);
    Vector most{}, odd{};  // NaN is no largest number, but nothing else than NaN may come of it
    each_vector(first, last, [&](int64_t i, int64_t count) {
      const Vector x = value(i, count), size = x < 0.0f ? -x : x;
      most = size > most ? size : most;
      odd += x - x;
    });
    float largest = 0;
    for (int64_t i = 0; i < WIDTH; ++i) largest = std::max(largest, most[i]);
    for (int64_t i = 0; i < WIDTH; ++i) largest += odd[i];
    const float scale = std::max(largest / grid.high, job.smallest);
    each_vector(first, last, [&](int64_t i, int64_t count) {
      const Vector made = code(value(i, count) / scale, grid.low, grid.high) * scale;
      if (HALVES) store_halves(made, static_cast<uint16_t*>(job.made) + at + i, count);
      else store(made, static_cast<float*>(job.made) + at + i, count);
    });
  }
}

void nearest(const Nearest& job, int64_t first, int64_t count) {
  const auto rounded = job.halves ? (job.times ? round_row<true, true> : round_row<false, true>)
                                  : (job.times ? round_row<true, false> : round_row<false, false>);
  for (int64_t row = first; row < first + count; ++row)
    rounded(job, job.grid.weight + row * job.grid.stride, row * job.grid.k);
}

// Scales take turns on a stretch of inputs, which stays in L1.
constexpr int64_t STRETCH = 1024;

void trials(const Trials& job, int64_t first, int64_t count) {
  const Grid& grid = job.grid;
  const int64_t groups = (grid.k + grid.size - 1) / grid.size;
  for (int64_t row = first; row < first + count; ++row) {
    const float* weight = grid.weight + row * grid.stride;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = (row * groups + g) * job.count, end = std::min(grid.k, (g + 1) * grid.size);
      Vector sums[MOST_TRIALS] = {};
      for (int64_t begin = g * grid.size; begin < end; begin += STRETCH)
        for (int64_t t = 0; t < job.count; ++t) {
          const float scale = job.scales[at + t], inverse = 1 / scale;
          Vector sum = sums[t];
          each_vector(begin, std::min(end, begin + STRETCH), [&](int64_t i, int64_t some) {
            const Vector x = load(weight + i, some), gap = x - code(x * inverse, grid.low, grid.high) * scale;
            sum += gap * gap * load(job.matter + i, some);
          });
          sums[t] = sum;
        }
      for (int64_t t = 0; t < job.count; ++t) {
        float error = 0;
        for (int64_t i = 0; i < WIDTH; ++i) error += sums[t][i];
        job.errors[at + t] = error;
      }
    }
  }
}

void restore(const Restored& job, int64_t first, int64_t count) {
  const int64_t size = job.k / job.groups;
  for (int64_t row = first; row < first + count; ++row)
    for (int64_t g = 0; g < job.groups; ++g) {
      const float scale = job.scales[row * job.groups + g];
      const int64_t at = row * job.k, less = row * job.stride;
      each_vector(g * size, (g + 1) * size, [&](int64_t i, int64_t some) {
        const Vector made = load(job.codes + at + i, some) * scale;
        store(job.less ? made - load(job.less + less + i, some) : made, job.made + at + i, some);
      });
    }
}

}  // namespace

extern const GridLoops TABLE;
const GridLoops TABLE = {nearest, trials, restore};
