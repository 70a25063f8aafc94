// Products of float32 matrices whose factors AMX multiplies as bfloat16: sums of products over tokens, in float32.
//
// A tile of the left factor holds 16 rows, each 32 steps of the sum; one of the right factor 16 rows of 2 steps for each of 16
// columns. So both are made of the same words, pairs of neighbouring steps, and one lies across the other: whichever way a
// factor lies in memory, it is read in vectors, and turned, 16 x 16 words, where that is not how a tile has it.
//
// Registers: 0..3 sums (rows 0, columns 0; rows 0, columns 1; rows 1, ...), 4 and 5 left, 6 and 7 right.
#include <algorithm>
#include "../tiles.h"
#include "job.h"
#include "words.h"

namespace {

constexpr int64_t BLOCK = 2 * TILE;

// 16 numbers rounded to bfloat16, each in the low half of a word.
inline __m512i halved(__m512 numbers) { return _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(numbers))); }

// 16 lines of `factor` from `line` on, 32 steps from `step` on, zeros where it ends: to a tile of the left factor, `by_line`, and
// to one of the right, `by_step`, whichever is wanted.
void pack(const Factor& factor, int64_t line, int64_t step, int64_t end, char* by_line, char* by_step) {
  __m512i words[TILE];
  const int64_t lines = factor.lines - line, left = end - step;
  const float* from = factor.numbers + line * factor.line_stride + step * factor.step_stride;
  const bool lies_by_line = factor.step_stride == 1;
  if (lies_by_line) {
    const __mmask16 low = first(left), high = first(left - TILE);
    for (int64_t i = 0; i < TILE; ++i) {
      const float* own = from + i * factor.line_stride;
      const bool there = i < lines;
      const __m512 front = _mm512_maskz_loadu_ps(there ? low : __mmask16(0), own);
      const __m512 back = _mm512_maskz_loadu_ps(there ? high : __mmask16(0), own + TILE);
      words[i] = __m512i(_mm512_cvtne2ps_pbh(back, front));
    }
  } else {
    const __mmask16 mask = first(lines);
    for (int64_t i = 0; i < TILE; ++i) {
      const float* own = from + 2 * i * factor.step_stride;
      const __m512 even = _mm512_maskz_loadu_ps(2 * i < left ? mask : __mmask16(0), own);
      const __m512 odd = _mm512_maskz_loadu_ps(2 * i + 1 < left ? mask : __mmask16(0), own + factor.step_stride);
      words[i] = _mm512_or_si512(halved(even), _mm512_slli_epi32(halved(odd), 16));
    }
  }
  char* as_it_lies = lies_by_line ? by_line : by_step;
  char* across = lies_by_line ? by_step : by_line;
  if (as_it_lies) store(words, as_it_lies);
  if (across) {
    turn(words);
    store(words, across);
  }
}

// `lines` x `steps` of a factor, [tiles of lines][tiles of steps].
char* packed(char* memory, int64_t tile, int64_t depth) { return memory + tile * depth * TILE_BYTES; }

// Sums of 32 rows and 32 columns over all of `depth` tiles of steps, [2][2][16][16].
inline void multiply(const char* left, const char* right, int64_t depth, float* sums) {
  const char *lower = left + depth * TILE_BYTES, *beside = right + depth * TILE_BYTES;
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  for (int64_t at = 0; at < depth * TILE_BYTES; at += TILE_BYTES) {
    TILE_LOAD(4, left + at, 64);
    TILE_LOAD(6, right + at, 64);
    TILE_MULTIPLY_BFLOAT16(0, 4, 6);
    TILE_LOAD(7, beside + at, 64);
    TILE_MULTIPLY_BFLOAT16(1, 4, 7);
    TILE_LOAD(5, lower + at, 64);
    TILE_MULTIPLY_BFLOAT16(2, 5, 6);
    TILE_MULTIPLY_BFLOAT16(3, 5, 7);
  }
  TILE_STORE(0, sums, 64);
  TILE_STORE(1, sums + TILE * TILE, 64);
  TILE_STORE(2, sums + 2 * TILE * TILE, 64);
  TILE_STORE(3, sums + 3 * TILE * TILE, 64);
}

void add(const Sum& job, int64_t row, int64_t column, const float* sums) {
  const __m512 share = _mm512_set1_ps(job.share), keep = _mm512_set1_ps(job.keep);
  for (int64_t i = 0; i < std::min(BLOCK, job.left.lines - row); ++i)
    for (int64_t j = 0; j < 2; ++j) {
      float* to = job.total + (row + i) * job.total_stride + column + j * TILE;
      const __mmask16 mask = first(sums_end(job, row + i) - column - j * TILE);
      const float* from = sums + ((i / TILE * 2 + j) * TILE + i % TILE) * TILE;
      __m512 made = _mm512_mul_ps(_mm512_load_ps(from), share);
      if (job.keep != 0) made = _mm512_add_ps(made, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, to), keep));
      _mm512_mask_storeu_ps(to, mask, made);
    }
}

int64_t scratch(const Sum& job, int64_t steps) {
  return (sums_tiles(job.left) + sums_tiles(job.right)) * ((steps + STEPS - 1) / STEPS) * TILE_BYTES;
}

int64_t packs(const Factor& factor, int64_t steps) {
  return factor.step_stride == 1 ? sums_tiles(factor) : (steps + STEPS - 1) / STEPS;
}

// Along the lines or along the steps, however the factor lies.
void pack_part(const Sum& job, bool right, int64_t part, int64_t step, int64_t steps) {
  const Factor& factor = right ? job.right : job.left;
  const int64_t depth = (steps + STEPS - 1) / STEPS, tiles = sums_tiles(job.left);
  const auto one = [&](int64_t tile, int64_t t) {
    char* own = packed(job.scratch, tile, depth) + t * TILE_BYTES;
    char* other = packed(job.scratch, tiles + tile, depth) + t * TILE_BYTES;
    pack(factor, tile * TILE, step + t * STEPS, step + steps, right ? nullptr : own, right || sums_shared(job) ? other : nullptr);
  };
  if (factor.step_stride == 1)
    for (int64_t t = 0; t < depth; ++t) one(part, t);
  else
    for (int64_t tile = 0; tile < sums_tiles(factor); ++tile) one(tile, part);
}

void multiply_part(const Sum& job, char*, Part rows, Part columns, Part steps) {
  const int64_t depth = (steps.count + STEPS - 1) / STEPS, before = sums_tiles(job.left);
  const TileConfiguration configuration;
  TILE_CONFIGURE(configuration);
  for (int64_t i = rows.first; i < rows.first + rows.count; i += BLOCK)
    for (int64_t j = columns.first; j < columns.first + columns.count; j += BLOCK) {
      if (!sums_wanted(job, i, BLOCK, j, BLOCK)) continue;
      alignas(64) float sums[BLOCK * BLOCK];
      multiply(packed(job.scratch, i / TILE, depth), packed(job.scratch, before + j / TILE, depth), depth, sums);
      add(job, i, j, sums);
    }
  TILE_RELEASE();
}

bool supported() { return __builtin_cpu_supports("avx512bf16") && may_use_tiles(TILES_OF_BFLOAT16); }

}  // namespace

const SumLoops AMX_SUMS{supported, scratch, 0, packs, pack_part, multiply_part};
