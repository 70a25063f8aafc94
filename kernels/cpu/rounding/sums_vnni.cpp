// Products of float32 matrices whose factors AVX512-VNNI multiplies as whole numbers, 32 at once where float32 has 16.
//
// Of 512 steps of a line, a span, the largest becomes 2047: no larger number has squares of which 512 add up in 32 bits. So sums
// over a span are exact; they are taken to float32, times the scales of their row and column, and added to the total. A tile
// of the left factor has a line in each row, one of the right factor a word; scales lie behind all tiles.
#include <algorithm>
#include "job.h"
#include "whole.h"

namespace {

constexpr int64_t SPAN = 512, SPAN_TILES = SPAN / STEPS;
constexpr int64_t PACKED = 4;  // tiles of lines that are packed together: what lies by steps is read 256 bytes at a time
constexpr int HELD = 8, COLUMNS = 2;  // vectors of sums that registers hold: rows, and tiles of columns

int64_t tiles_of(int64_t steps) { return (steps + STEPS - 1) / STEPS; }
int64_t spans_of(int64_t steps) { return (steps + SPAN - 1) / SPAN; }

int64_t scratch(const Sum& job, int64_t steps) {
  const int64_t each = tiles_of(steps) * TILE_BYTES + spans_of(steps) * TILE * int64_t(sizeof(float));
  return (sums_tiles(job.left) + sums_tiles(job.right)) * each;
}

Place place(const Sum& job, bool right, int64_t tile, int64_t span, int64_t steps) {
  const int64_t first_tile = right ? sums_tiles(job.left) : 0, all = sums_tiles(job.left) + sums_tiles(job.right);
  float* scales = reinterpret_cast<float*>(job.scratch + all * tiles_of(steps) * TILE_BYTES);
  return {job.scratch + ((first_tile + tile) * tiles_of(steps) + span * SPAN_TILES) * TILE_BYTES,
          scales + ((first_tile + tile) * spans_of(steps) + span) * TILE};
}

int64_t packs(const Factor& factor, int64_t steps) { return (sums_tiles(factor) + PACKED - 1) / PACKED * spans_of(steps); }

void pack_part(const Sum& job, bool right, int64_t part, int64_t step, int64_t steps) {
  const Factor& factor = right ? job.right : job.left;
  const auto pack = factor.step_stride == 1 ? pack_by_line : pack_by_step;
  const int64_t span = part % spans_of(steps), begin = part / spans_of(steps) * PACKED;
  for (int64_t tile = begin; tile < std::min(begin + PACKED, sums_tiles(factor)); ++tile) {
    Place by_line = place(job, false, tile, span, steps), by_word = place(job, true, tile, span, steps);
    const Wanted wanted{right ? nullptr : &by_line, right || sums_shared(job) ? &by_word : nullptr};
    pack(factor, tile * TILE, step + span * SPAN, std::min(SPAN, steps - span * SPAN), wanted);
  }
}

// Sums of HELD lines of the left factor and COLUMNS tiles, `beside` bytes apart, of the right one, over so many tiles of steps.
inline void multiply(const char* left, const char* right, int64_t beside, int64_t tiles, __m512i (&made)[HELD][COLUMNS]) {
  __m512i sums[HELD][COLUMNS];
  for (auto& row : sums)
    for (auto& sum : row) sum = _mm512_setzero_si512();
  for (; tiles; --tiles, left += TILE_BYTES, right += TILE_BYTES)
#pragma GCC unroll 16
    for (int64_t word = 0; word < TILE; ++word) {
      __m512i columns[COLUMNS];
      for (int j = 0; j < COLUMNS; ++j) columns[j] = _mm512_load_si512(right + j * beside + word * 64);
#pragma GCC unroll 8
      for (int i = 0; i < HELD; ++i) {
        int32_t own;
        __builtin_memcpy(&own, left + i * 64 + word * 4, 4);
        for (int j = 0; j < COLUMNS; ++j) add_products(sums[i][j], _mm512_set1_epi32(own), columns[j]);
      }
    }
  for (int i = 0; i < HELD; ++i)
    for (int j = 0; j < COLUMNS; ++j) made[i][j] = sums[i][j];
}

// One span of steps: its sums times their scales, and what the total keeps.
void multiply_span(const Sum& job, int64_t span, int64_t row, int64_t column, int64_t at_once, int64_t steps, float keep) {
  const int64_t tiles = std::min(SPAN_TILES, tiles_of(steps) - span * SPAN_TILES), beside = tiles_of(steps) * TILE_BYTES;
  const int64_t rows = std::min(row + at_once, job.left.lines), columns = std::min(column + at_once, job.right.lines);
  const __m512 share = _mm512_set1_ps(job.share);
  for (int64_t j = column; j < columns; j += COLUMNS * TILE)
    for (int64_t i = row; i < rows; i += HELD) {
      if (!sums_wanted(job, i, HELD, j, COLUMNS * TILE)) continue;
      const Place left = place(job, false, i / TILE, span, steps), right = place(job, true, j / TILE, span, steps);
      float* total = job.total + i * job.total_stride + j;
      for (int64_t r = 0; r < std::min<int64_t>(HELD, rows - i); ++r)
        for (int64_t c = 0; c < COLUMNS; ++c) __builtin_prefetch(total + r * job.total_stride + c * TILE, 1);
      __m512i sums[HELD][COLUMNS];
      multiply(left.tiles + i % TILE * 64, right.tiles, beside, tiles, sums);
      for (int64_t r = 0; r < std::min<int64_t>(HELD, rows - i); ++r)
        for (int64_t c = 0; c < COLUMNS; ++c) {
          const __mmask16 mask = first(std::min(columns, sums_end(job, i + r)) - j - c * TILE);
          float* to = total + r * job.total_stride + c * TILE;
          const __m512 scales = _mm512_load_ps(right.scales + c * spans_of(steps) * TILE);
          const __m512 times = _mm512_mul_ps(scales, _mm512_set1_ps(left.scales[i % TILE + r]));  // either way round
          __m512 found = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][c]), _mm512_mul_ps(times, share));
          if (keep != 0) found = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, to), _mm512_set1_ps(keep), found);
          _mm512_mask_storeu_ps(to, mask, found);
        }
    }
}

void multiply_part(const Sum& job, int64_t row, int64_t column, int64_t at_once, int64_t steps) {
  for (int64_t span = 0; span < spans_of(steps); ++span)
    multiply_span(job, span, row, column, at_once, steps, span ? 1.0f : job.keep);
}

}  // namespace

const SumLoops VNNI_SUMS{supported, scratch, packs, pack_part, multiply_part, 2 * SUMS_AT_ONCE};
