// What the loops work on, and the functions that a code path fills: blocks of a weight's columns whose codes are decided one
// after another, and weights whose numbers are rounded each by itself.
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

constexpr int64_t MOST_TRIALS = 16;
constexpr int64_t ROWS = 8;  // of a grid that a thread takes at once

// What a code path fills, one table for each source.
struct ColumnLoops {
  void (*round)(const Rounding& job, int64_t first, int64_t count);  // LANES outputs at most, from `first` on
  void (*descend)(const Descent& job, int64_t first, int64_t count);
};
struct GridLoops {
  void (*nearest)(const Nearest& job, int64_t first, int64_t count);  // ROWS rows at most, from `first` on
  void (*trials)(const Trials& job, int64_t first, int64_t count);
};

extern const ColumnLoops AVX512_COLUMNS, AVX2_COLUMNS, PORTABLE_COLUMNS;
extern const GridLoops AVX512_GRIDS, AVX2_GRIDS, PORTABLE_GRIDS;
