// What the loops work on, and the functions that a code path fills: blocks of a weight's columns whose codes are decided one
// after another, weights whose numbers are rounded each by itself, what a decoder layer computes, products of rounded factors.
//
// Arrays [columns, n] hold a column of the weight in a row of memory: its n outputs go side by side, each by itself.
#pragma once
#include <cstdint>

constexpr int64_t LANES = 64;          // outputs of a tile
constexpr int64_t MOST_COLUMNS = 256;  // of a block

// Column i, once decided, moves every column j > i by spread[j, i] times what it left.
struct Spread {
  const float* rows;  // [columns, columns], dense, entry (j, i) for i < j
  int64_t columns;
  float low, high;  // the range of codes
};

// Compensation: w_j -= sum of spread[j, i] lost_i; code = w_j / step_j, rounded; lost_j = w_j - code step_j.
struct Rounding {
  Spread spread;
  const float* weight;     // [columns, n], rows weight_stride apart
  const float* steps;      // [groups, n], dense
  const int64_t* groups;   // [columns]: the group of each column
  int64_t n, weight_stride;
  int8_t* codes;           // [columns, n], dense
  float* lost;             // [columns, n], dense
};

// Descent: wish_j = code_j - slope_j / (bend_j step) - sum of spread[j, i] moved_i, rounded; moved_j = it - code_j.
struct Descent {
  Spread spread;
  const float* slope;  // [columns, n], dense
  const float* step;   // [n], of all these columns
  const float* bend;   // [columns]
  int64_t n;
  float* codes;        // [columns, n], dense: whole numbers; the new ones afterwards
  float* moved;        // [columns, n], dense: in the weight's own unit
};

// A weight as it lies, in groups of neighbouring inputs.
struct Grid {
  const float* weight;  // [n, k], rows `stride` apart
  int64_t n, k, stride;
  int64_t size;         // inputs of a group
  float low, high;      // the range of codes
};

// Every number, times its input's factor, becomes the nearest code times its group's absmax / high.
struct Nearest {
  Grid grid;
  const float* times;  // [k], or null
  float smallest;      // of a scale
  int64_t halves;      // 0: `made` is float32, 1: bfloat16
  void* made;          // [n, k], dense
};

// How far rounding leaves every group for each of some scales: the sum of matter (code scale - weight)^2.
struct Trials {
  Grid grid;
  const float* matter;  // [k]
  const float* scales;  // [n, groups, count], dense
  int64_t count;        // MOST_TRIALS at most
  float* errors;        // [n, groups, count], dense
};

// What codes stand for, less a weight: made = code scale - less.
struct Restored {
  const int8_t* codes;  // [n, k], dense
  const float* scales;  // [n, groups], dense
  const float* less;    // [n, k], rows `stride` apart, or null
  int64_t n, k, stride, groups;
  float* made;          // [n, k], dense
};

constexpr int64_t MOST_TRIALS = 16;
constexpr int64_t ROWS = 8;  // of a grid that a thread takes at once

// made = x / sqrt(mean of a row's squares + epsilon), times weight.
struct Norm {
  const float* x;       // [n, k], dense
  const float* weight;  // [k]
  int64_t n, k;
  float epsilon;
  float* made;  // [n, k], dense
};

// made = gate / (1 + e^-gate), times up.
struct Gate {
  const float *gate, *up;
  int64_t count;
  float* made;
};

constexpr int64_t GATED = 4096;  // numbers that a thread takes at once

// A factor of a product: lines (rows of the left one, columns of the right one) of numbers that are summed over, step by step.
struct Factor {
  const float* numbers;
  int64_t lines, line_stride, step_stride;  // one of the strides is 1
};

// All of a total; what is on and above its diagonal, blocks below it staying as they are; or on and below it, and all else stays.
enum Half : int64_t { WHOLE, UPPER, LOWER };

// total = keep total + share left right, with factors rounded to what the CPU multiplies faster than float32.
struct Sum {
  Factor left, right;
  int64_t steps;
  float keep, share;
  float* total;          // [left's lines, right's lines], rows total_stride apart; what it held is not read if keep is 0
  int64_t total_stride;
  Half half;             // of the total that is wanted
  char* scratch;         // sums_scratch bytes, aligned to 64
};

// Whether a block of so many rows and columns, from these on, holds something of what is wanted.
inline bool sums_wanted(const Sum& job, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  return job.half == WHOLE || (job.half == UPPER ? column + columns > row : row + rows > column);
}

// The column that a row ends before.
inline int64_t sums_end(const Sum& job, int64_t row) {
  return job.half == LOWER && row < job.right.lines ? row + 1 : job.right.lines;
}

constexpr int64_t SUMS_AT_ONCE = 64;  // rows and columns that a thread takes at once
constexpr int64_t SUMS_COLUMNS = 128;  // at most, where it packs them itself, and then many rows
constexpr int64_t SUMS_STEPS = 1024;  // that are packed at once

inline int64_t sums_tiles(const Factor& factor) { return (factor.lines + 31) / 32 * 2; }

// Whether the factors are one matrix, which then is packed once.
inline bool sums_shared(const Sum& job) {
  return job.left.numbers == job.right.numbers && job.left.lines == job.right.lines &&
         job.left.line_stride == job.right.line_stride && job.left.step_stride == job.right.step_stride;
}

// A matrix [k, k] as sweeps over all columns of a weight read it: packed once, with the blocks on its diagonal.
struct Swept {
  Factor factor;   // in a line what a column gets of every other, step by step
  int64_t block;   // columns that are decided before others are told: MOST_SWEPT, or 64 or 32
  int64_t ahead;   // 1: columns leave something only to those behind them (compensation), 0: to all (descent)
  float* bend;     // [k], the diagonal
  float* corners;  // [blocks, block, block], the last one dense
  char* words;     // sweep_bytes, aligned to 64
};

// A sweep over all columns: compensation of `numbers`, or descent from `codes` by the slope matrix times `numbers`; no `sweeps`:
// only that product, which is put `before` them.
struct Sweep {
  const Swept* matrix;
  const float* numbers;  // [n, k], dense: the weight, or what codes stand for less the weight
  const float* steps;    // [n, groups], dense
  const int64_t* group;  // [k]: the group of each column; descent: k / groups neighbours have one
  int64_t n, groups;
  float low, high;       // the range of codes
  int64_t sweeps;        // of descent
  int8_t* codes;         // [n, k], dense
  float *before, *after;  // [n, k], dense, or null: the slopes of descent
  char* scratch;         // sweep_scratch bytes, aligned to 64
};

constexpr int64_t MOST_SWEPT = 128;

// Rows of a head, token by token.
struct Lanes {
  const float* numbers;
  int64_t sequence_stride, head_stride, token_stride;
};

// made = softmax of scale query key^T over a token and those before it, times value: attention in float32.
struct Attention {
  Lanes query, key, value;
  int64_t sequences, heads, sources, length, width;  // sources: heads of keys and values; a width of whole HEAD_STEPs
  float scale;
  float* made;     // [sequences, length, heads, width], dense
  float* scratch;  // keys and values as they are multiplied: as many numbers as `scratch` says
};

constexpr int64_t HEAD_STEP = 32, MOST_WIDTH = 256, MOST_LENGTH = 2048;
constexpr int64_t QUERIES = 32;  // of a head that a thread takes at once

// What a code path fills, one table for each source.
struct ColumnLoops {
  void (*round)(const Rounding& job, int64_t first, int64_t count);  // LANES outputs at most, from `first` on
  void (*descend)(const Descent& job, int64_t first, int64_t count);
};
struct GridLoops {
  void (*nearest)(const Nearest& job, int64_t first, int64_t count);  // ROWS rows at most, from `first` on
  void (*trials)(const Trials& job, int64_t first, int64_t count);
  void (*restore)(const Restored& job, int64_t first, int64_t count);
};

struct LayerLoops {
  void (*norm)(const Norm& job, int64_t first, int64_t count);  // ROWS rows at most, from `first` on
  void (*gate)(const Gate& job, int64_t first, int64_t count);  // GATED numbers at most, from `first` on
};
struct AttentionLoops {
  int64_t (*scratch)(const Attention& job);
  void (*pack)(const Attention& job, int64_t source);  // of all sequences' sources
  void (*attend)(const Attention& job, int64_t sequence, int64_t head, int64_t first);  // QUERIES at most, from `first` on
};
struct Part {
  int64_t first, count;
};
struct SumLoops {
  bool (*supported)();
  int64_t (*scratch)(const Sum& job, int64_t steps);  // bytes that packed factors take, `steps` at once
  int64_t own;                                        // bytes for a thread beside it, or 0
  int64_t (*packs)(const Factor& factor, int64_t steps);
  // Packs a part of a factor, of `packs` parts, for `steps` steps from `step` on; if threads have their own, of the left one.
  void (*pack)(const Sum& job, bool right, int64_t part, int64_t step, int64_t steps);
  // Adds the sums over the packed steps of some rows and columns. A thread's own bytes take the columns' steps first.
  void (*multiply)(const Sum& job, char* own, Part rows, Part columns, Part steps);
};

struct SweepLoops {
  bool (*supported)();
  int64_t (*bytes)(const Swept& matrix);              // that its words take
  void (*pack)(const Swept& matrix, int64_t tile);    // 16 lines
  int64_t (*scratch)(const Sweep& job);               // bytes for a thread
  // LANES outputs at most, from `output` on; blocks of columns by `loops`.
  void (*round)(const Sweep& job, const ColumnLoops& loops, int thread, int64_t output, int64_t count);
  void (*descend)(const Sweep& job, const ColumnLoops& loops, int thread, int64_t output, int64_t count);
};

extern const ColumnLoops AVX512_COLUMNS, AVX2_COLUMNS, PORTABLE_COLUMNS;
extern const GridLoops AVX512_GRIDS, AVX2_GRIDS, PORTABLE_GRIDS;
extern const LayerLoops AVX512_LAYERS, AVX2_LAYERS, PORTABLE_LAYERS;
extern const AttentionLoops AVX512_ATTENTION, AVX2_ATTENTION, PORTABLE_ATTENTION;
extern const SumLoops AMX_SUMS, VNNI_SUMS;
extern const SweepLoops VNNI_SWEEPS;
