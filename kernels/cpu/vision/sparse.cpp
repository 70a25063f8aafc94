// Sums of sparse products, from one source in compiler vectors: 16 floats with AVX512, 8 with AVX2, 4 on any CPU.
//
// A group of 1 to 4 outputs has one list of columns. In groups of several outputs (1xN) a loaded vector of inputs
// serves them all. In N:M sparsity each output has its own columns, so every product is a load: the tile of inputs is
// copied, a window of columns at a time, to where it is aligned and stays in L1, and all groups pass over it. Weights
// are stored by windows, so that they stream.
#include <algorithm>
#include <cstring>
#include "job.h"

namespace {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
constexpr int MOST_VECTORS[] = {0, 8, 8, 6, 6};  // by rows; rows * vectors sums, vectors of inputs, one value
#define THIS_PATH AVX512_SPARSE
#elif defined(__AVX2__)
constexpr int64_t LANES = 8;
constexpr int MOST_VECTORS[] = {0, 8, 4, 3, 3};
#define THIS_PATH AVX2_SPARSE
#else
constexpr int64_t LANES = 4;
constexpr int MOST_VECTORS[] = {0, 8, 4, 3, 3};
#define THIS_PATH PORTABLE_SPARSE
#endif
typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef float Unaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline Vector load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<Unaligned*>(p) = v; }
inline Vector spread(float value) { return value - Vector{}; }

// Add the entries of one window to the sums of every group; column j lies at lanes + place(j).
template <int ROWS, int VECTORS, class Place>
inline void add_window(const SparseTile& tile, int64_t window, const float* lanes, Place place) {
  for (int64_t group = tile.first; group < tile.last; ++group) {
    float* sums = tile.sums + (group - tile.first) * ROWS * SPARSE_LANES;
    const int32_t* columns = tile.columns + (window * tile.groups + group) * tile.length;
    const float* values = tile.values + (window * tile.groups + group) * tile.length * ROWS;
    Vector sum[ROWS][VECTORS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = window ? load(sums + r * SPARSE_LANES + v * LANES) : Vector{};
    for (int64_t i = 0; i < tile.length; ++i) {
      const float* inputs = lanes + place(columns[i]);
      Vector x[VECTORS];
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) x[v] = load(inputs + v * LANES);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const Vector value = spread(values[i * ROWS + r]);
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) sum[r][v] += value * x[v];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) store(sums + r * SPARSE_LANES + v * LANES, sum[r][v]);
  }
}

template <int ROWS, int VECTORS>
void multiply_tile(const SparseTile& tile) {
  if (tile.windows == 1) {
    const int32_t* offsets = tile.offsets;
    return add_window<ROWS, VECTORS>(tile, 0, tile.lanes, [=](int32_t j) { return offsets[j]; });
  }
  for (int64_t window = 0; window < tile.windows; ++window) {
    const int64_t first = window * tile.window;
    for (int64_t j = 0; j < tile.window; ++j)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v)
        store(tile.near + j * SPARSE_LANES + v * LANES, load(tile.lanes + tile.offsets[first + j] + v * LANES));
    add_window<ROWS, VECTORS>(tile, window, tile.near, [=](int32_t j) { return (j - first) * SPARSE_LANES; });
  }
}

template <int ROWS>
void multiply_rows(const SparseTile& tile) {
  static_assert(MOST_VECTORS[ROWS] <= 8, "cases below");
  constexpr int MOST = MOST_VECTORS[ROWS];
  switch ((tile.lane_count + LANES - 1) / LANES) {
    case 1: return multiply_tile<ROWS, 1>(tile);
    case 2: return multiply_tile<ROWS, 2>(tile);
    case 3: return multiply_tile<ROWS, 3>(tile);
    case 4: return multiply_tile<ROWS, std::min(4, MOST)>(tile);
    case 5: return multiply_tile<ROWS, std::min(5, MOST)>(tile);
    case 6: return multiply_tile<ROWS, std::min(6, MOST)>(tile);
    case 7: return multiply_tile<ROWS, std::min(7, MOST)>(tile);
    default: return multiply_tile<ROWS, MOST>(tile);
  }
}

void multiply(const SparseTile& tile) {
  switch (tile.rows) {
    case 1: return multiply_rows<1>(tile);
    case 2: return multiply_rows<2>(tile);
    case 3: return multiply_rows<3>(tile);
    default: return multiply_rows<4>(tile);
  }
}

int64_t tile_lanes(int rows) { return MOST_VECTORS[rows] * LANES; }

double peak(int64_t rounds) {
  constexpr int VECTORS = 12;
  Vector sum[VECTORS] = {}, a = spread(0.5f), b = spread(0.25f);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < VECTORS; ++i) {
      sum[i] += a * b;
#if defined(__x86_64__)
      asm volatile("" : "+x"(sum[i]), "+x"(a), "+x"(b));  // every product is computed
#else
      asm volatile("" : "+w"(sum[i]), "+w"(a), "+w"(b));
#endif
    }
  }
  return double(rounds) * VECTORS * LANES * 2;
}

}  // namespace

const SparsePath THIS_PATH{tile_lanes, multiply, peak};
