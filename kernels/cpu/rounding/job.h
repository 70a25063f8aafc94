// A block of a weight's columns whose codes are decided one after another, and the functions that a code path fills.
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

struct RoundingPath {
  void (*round)(const Rounding& job, int64_t first, int64_t count);  // LANES outputs at most, from `first` on
  void (*descend)(const Descent& job, int64_t first, int64_t count);
};

extern const RoundingPath AVX512_ROUNDING, AVX2_ROUNDING, PORTABLE_ROUNDING;
