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
constexpr int64_t TOGETHER = 64;  // rows whose numbers stay in the cache, beside those of the columns
constexpr int HELD = 8, COLUMNS = 2;  // vectors of sums that registers hold: rows, and tiles of columns

constexpr int64_t OWN_TILES = SUMS_COLUMNS / TILE;  // of columns that a thread packs

constexpr int64_t tiles_of(int64_t steps) { return (steps + STEPS - 1) / STEPS; }
constexpr int64_t spans_of(int64_t steps) { return (steps + SPAN - 1) / SPAN; }

// Of so many tiles: their numbers, and behind all of them their scales.
constexpr int64_t bytes(int64_t tiles, int64_t steps) {
  return tiles * (tiles_of(steps) * TILE_BYTES + spans_of(steps) * TILE * int64_t(sizeof(float)));
}

int64_t scratch(const Sum& job, int64_t steps) { return bytes(sums_tiles(job.left), steps); }

Place place(char* packed, int64_t tiles, int64_t tile, int64_t span, int64_t steps) {
  float* scales = reinterpret_cast<float*>(packed + tiles * tiles_of(steps) * TILE_BYTES);
  return {packed + (tile * tiles_of(steps) + span * SPAN_TILES) * TILE_BYTES, scales + (tile * spans_of(steps) + span) * TILE};
}

Place left_place(const Sum& job, int64_t line, int64_t span, int64_t steps) {
  return place(job.scratch, sums_tiles(job.left), line / TILE, span, steps);
}

int64_t packs(const Factor& factor, int64_t steps) { return (sums_tiles(factor) + PACKED - 1) / PACKED * spans_of(steps); }

void pack_part(const Sum& job, bool, int64_t part, int64_t step, int64_t steps) {
  const auto pack = job.left.step_stride == 1 ? pack_by_line : pack_by_step;
  const int64_t span = part % spans_of(steps), begin = part / spans_of(steps) * PACKED;
  for (int64_t tile = begin; tile < std::min(begin + PACKED, sums_tiles(job.left)); ++tile) {
    Place by_line = left_place(job, tile * TILE, span, steps);
    pack(job.left, tile * TILE, step + span * SPAN, std::min(SPAN, steps - span * SPAN), {&by_line, nullptr});
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
void multiply_span(const Sum& job, char* own, Part rows, Part columns, int64_t span, int64_t steps, float keep) {
  const int64_t tiles = std::min(SPAN_TILES, tiles_of(steps) - span * SPAN_TILES), beside = tiles_of(steps) * TILE_BYTES;
  const int64_t last_row = rows.first + rows.count, last_column = columns.first + columns.count;
  const __m512 share = _mm512_set1_ps(job.share);
  for (int64_t j = columns.first; j < last_column; j += COLUMNS * TILE)
    for (int64_t i = rows.first; i < last_row; i += HELD) {
      if (!sums_wanted(job, i, HELD, j, COLUMNS * TILE)) continue;
      const Place left = left_place(job, i, span, steps);
      const Place right = place(own, OWN_TILES, (j - columns.first) / TILE, span, steps);
      float* total = job.total + i * job.total_stride + j;
      for (int64_t r = 0; r < std::min<int64_t>(HELD, last_row - i); ++r)
        for (int64_t c = 0; c < COLUMNS; ++c) __builtin_prefetch(total + r * job.total_stride + c * TILE, 1);
      __m512i sums[HELD][COLUMNS];
      multiply(left.tiles + i % TILE * 64, right.tiles, beside, tiles, sums);
      for (int64_t r = 0; r < std::min<int64_t>(HELD, last_row - i); ++r)
        for (int64_t c = 0; c < COLUMNS; ++c) {
          const __mmask16 mask = first(std::min(last_column, sums_end(job, i + r)) - j - c * TILE);
          float* to = total + r * job.total_stride + c * TILE;
          const __m512 scales = _mm512_load_ps(right.scales + c * spans_of(steps) * TILE);
          const __m512 times = _mm512_mul_ps(scales, _mm512_set1_ps(left.scales[i % TILE + r]));  // either way round
          __m512 found = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][c]), _mm512_mul_ps(times, share));
          if (keep != 0) found = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, to), _mm512_set1_ps(keep), found);
          _mm512_mask_storeu_ps(to, mask, found);
        }
    }
}

// The columns are packed by the thread that multiplies with them: in its cache.
void multiply_part(const Sum& job, char* own, Part rows, Part columns, Part steps) {
  const auto pack = job.right.step_stride == 1 ? pack_by_line : pack_by_step;
  for (int64_t span = 0; span < spans_of(steps.count); ++span) {
    const int64_t begin = span * SPAN, some = std::min(SPAN, steps.count - begin);
    for (int64_t column = 0; column < columns.count; column += COLUMNS * TILE)
      for (int64_t c = 0; c < COLUMNS; ++c) {
        const int64_t line = column + c * TILE;
        Place by_word = place(own, OWN_TILES, line / TILE, span, steps.count);
        pack(job.right, columns.first + line, steps.first + begin, some, {nullptr, &by_word});
      }
    const float keep = span ? 1.0f : job.keep;
    for (int64_t row = 0; row < rows.count; row += TOGETHER)
      multiply_span(job, own, {rows.first + row, std::min(TOGETHER, rows.count - row)}, columns, span, steps.count, keep);
  }
}

}  // namespace

const SumLoops VNNI_SUMS{supported, scratch, bytes(OWN_TILES, SUMS_STEPS), packs, pack_part, multiply_part};
