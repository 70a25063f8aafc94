// The tables of functions that each code path fills: sign bits and their counts, and sums of sparse products.
#pragma once
#include <cstdint>

// Binary. A word is 32 sign bits, 1 for +1 (x >= 0). Mismatches of two words are popcount(a ^ b), and a product of
// k signs is k - 2 * mismatches.
constexpr int64_t WORD = 32;
constexpr int BINARY_ROWS = 4;     // broadcast rows a tile
constexpr int64_t BINARY_LANES = 64;  // lanes a tile: 64 outputs of a linear layer, 64 positions of a convolution

struct BinaryTile {
  const uint32_t* lanes;     // word i of lane l is lanes[offsets[i] + l]; BINARY_LANES of them can be read
  const int32_t* offsets;    // [words]
  const uint32_t* rows;      // word i of row r is rows[r * row_stride + i]
  int64_t row_stride, words;
  int row_count;             // 1..BINARY_ROWS
  int64_t lane_count;        // 1..BINARY_LANES, those that are wanted
  int32_t* counts;           // [row_count, BINARY_LANES]: mismatches
};

// Lanes of a tile that are one stretch of an output row: `out` is its first place in a channel's image.
struct Stretch {
  int64_t lane, count, out;
  int64_t start;  // of its first lane in a channel's table of starts; binary layers only
};

struct BinaryPath {
  // Sign bits of `count` pixels of up to 32 channels, one word a pixel; channels are `channel_stride` apart.
  void (*pack_pixels)(const float* x, int64_t channel_stride, int64_t channels, int64_t count, uint32_t* out);
  // Sign bits of a row of k numbers; the last word is filled with zeros.
  void (*pack_row)(const float* x, int64_t k, uint32_t* out);
  void (*count)(const BinaryTile& tile);
  // y = (start - 2 * count) * scale + bias along places of one channel; or, with a threshold, +1 or -1.
  void (*finish_places)(const int32_t* counts, const Stretch* stretches, int64_t stretch_count, const int32_t* starts,
                        float scale, const float* bias, const int32_t* threshold, float* y);
  // The same along channels, start = k for all of them; bias and thresholds may be null.
  void (*finish_channels)(const int32_t* counts, int32_t start, int64_t count, const float* scale, const float* bias,
                          const int32_t* thresholds, float* y);
  // Exclusive-or, count and add from registers, `rounds` times 16 vectors; returns bits compared.
  double (*peak)(int64_t rounds);
};

// Sparse. Groups of 1..4 outputs share a list of columns; lanes are positions.
constexpr int SPARSE_ROWS = 4;
constexpr int64_t SPARSE_LANES = 128;  // at most, in one tile

struct SparseTile {
  const float* lanes;       // lane l of column j is lanes[offsets[j] + l]
  const int32_t* offsets;   // [windows * window]
  const int32_t* columns;   // [windows, groups, length]
  const float* values;      // [windows, groups, length, rows]
  int64_t windows, window;  // stretches of columns, and columns of one
  int64_t groups, length;
  int rows;                 // 1..SPARSE_ROWS
  int64_t first, last;      // groups to do
  int64_t lane_count;       // 1..tile_lanes(rows)
  float* sums;              // [(last - first) * rows, SPARSE_LANES]
  float* near;              // [window, SPARSE_LANES] on a cache line, where there are several windows
};

struct SparsePath {
  int64_t (*tile_lanes)(int rows);  // lanes of a full tile, a multiple of the vector, at most SPARSE_LANES
  void (*multiply)(const SparseTile& tile);
  double (*peak)(int64_t rounds);  // multiply-adds from registers; returns operations, 2 each
};

struct VisionPath {
  const char* name;
  const BinaryPath* binary;
  const SparsePath* sparse;
};

extern const BinaryPath PORTABLE_BINARY;
extern const SparsePath PORTABLE_SPARSE;
#if defined(__x86_64__)
extern const BinaryPath AVX2_BINARY, AVX512_BINARY;
extern const SparsePath AVX2_SPARSE, AVX512_SPARSE;
#endif
