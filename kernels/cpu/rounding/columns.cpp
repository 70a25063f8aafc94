// One tile of outputs through a block of columns. Compiled once for each instruction set; vectors are the compiler's.
#include <cstring>
#include "job.h"
#include "vectors.h"

namespace {

constexpr int64_t VECTORS = LANES / WIDTH, HELD = 4;  // vectors of a tile, and of it in registers

struct Tile {
  Vector parts[VECTORS];
};

Tile read(const float* from, int64_t count, float rest = 0.0f) {
  float padded[LANES];
  if (count < LANES) {
    for (int64_t i = 0; i < LANES; ++i) padded[i] = i < count ? from[i] : rest;
    from = padded;
  }
  Tile made;
  std::memcpy(&made, from, sizeof made);
  return made;
}

void write(const Tile& tile, float* to, int64_t count) { std::memcpy(to, &tile, size_t(count) * sizeof(float)); }

// What columns 0..j leave to column j.
Tile carried(Tile value, const float* spread, const Tile* left, int64_t j) {
  for (int64_t first = 0; first < VECTORS; first += HELD) {
    Vector sums[HELD];
    for (int64_t v = 0; v < HELD; ++v) sums[v] = value.parts[first + v];
    for (int64_t i = 0; i < j; ++i)
      for (int64_t v = 0; v < HELD; ++v) sums[v] -= left[i].parts[first + v] * spread[i];
    for (int64_t v = 0; v < HELD; ++v) value.parts[first + v] = sums[v];
  }
  return value;
}

void round(const Rounding& job, int64_t first, int64_t count) {
  Tile lost[MOST_COLUMNS];
  const Spread& spread = job.spread;
  for (int64_t j = 0; j < spread.columns; ++j) {
    Tile value = read(job.weight + j * job.weight_stride + first, count);
    value = carried(value, spread.rows + j * spread.columns, lost, j);
    const Tile step = read(job.steps + job.groups[j] * job.n + first, count, 1.0f);
    int8_t codes[LANES];
    for (int64_t v = 0; v < VECTORS; ++v) {
      const Vector found = code(value.parts[v] / step.parts[v], spread.low, spread.high);
      lost[j].parts[v] = value.parts[v] - found * step.parts[v];
      for (int64_t i = 0; i < WIDTH; ++i) codes[v * WIDTH + i] = int8_t(found[i]);
    }
    std::memcpy(job.codes + j * job.n + first, codes, size_t(count));
    write(lost[j], job.lost + j * job.n + first, count);
  }
}

void descend(const Descent& job, int64_t first, int64_t count) {
  Tile moved[MOST_COLUMNS];
  const Spread& spread = job.spread;
  const Tile step = read(job.step + first, count, 1.0f);
  for (int64_t j = 0; j < spread.columns; ++j) {
    const Tile slope = read(job.slope + j * job.n + first, count);
    const Tile before = read(job.codes + j * job.n + first, count);
    Tile wish, change;
    for (int64_t v = 0; v < VECTORS; ++v)
      wish.parts[v] = before.parts[v] - slope.parts[v] / (step.parts[v] * job.bend[j]);
    wish = carried(wish, spread.rows + j * spread.columns, moved, j);
    for (int64_t v = 0; v < VECTORS; ++v) {
      wish.parts[v] = code(wish.parts[v], spread.low, spread.high);
      moved[j].parts[v] = wish.parts[v] - before.parts[v];
      change.parts[v] = moved[j].parts[v] * step.parts[v];
    }
    write(wish, job.codes + j * job.n + first, count);
    write(change, job.moved + j * job.n + first, count);
  }
}

}  // namespace

extern const ColumnLoops TABLE;
const ColumnLoops TABLE = {round, descend};
