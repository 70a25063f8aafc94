// Float32 numbers of a span of steps as whole numbers with a scale: what the products by AVX512-VNNI are packed into.
// Everything has internal linkage, as in vectors.h.
#pragma once
#include "job.h"
#include "words.h"

namespace {

constexpr float LARGEST = 2047.0f;
constexpr float SMALLEST = 1e-30f;  // a span with nothing above counts as zeros: its scale has no inverse

// Adds the products of pairs of 16-bit numbers. Written out: of the intrinsic GCC makes copies of sums, on the ports that multiply.
inline void add_products(__m512i& sum, __m512i left, __m512i right) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(left), "v"(right));
}

// A tile of lines of a packed factor in one span: tiles of steps one behind another, and the scales of its lines.
struct Place {
  char* tiles;
  float* scales;  // [16]
};

// Whether a factor's tile is wanted with a line in each row, with a word, or both.
struct Wanted {
  Place *by_line, *by_word;

  void scales(__m512 made) const {
    if (by_line) _mm512_store_ps(by_line->scales, made);
    if (by_word) _mm512_store_ps(by_word->scales, made);
  }
};

// Magnitudes as integers, which order them as float32 does, NaN above all.
inline __m512i magnitude(__m512 numbers) { return _mm512_and_si512(__m512i(numbers), _mm512_set1_epi32(0x7fffffff)); }

// What lines with these largest magnitudes are multiplied with; and their scales, NaN where a number is.
inline __m512 multiples(__m512i largest, __m512& scales) {
  const __m512 most = __m512(largest);
  const __mmask16 some = _mm512_cmp_ps_mask(most, _mm512_set1_ps(SMALLEST), _CMP_NLT_UQ);
  scales = _mm512_maskz_mul_ps(some, most, _mm512_set1_ps(1.0f / LARGEST));
  return _mm512_maskz_div_ps(some, _mm512_set1_ps(LARGEST), most);
}

// 16 lines from `line` on over `left` steps from `step` on, of a factor whose steps are neighbours; zeros behind them.
void pack_by_line(const Factor& factor, int64_t line, int64_t step, int64_t left, const Wanted& wanted) {
  const float* from = factor.numbers + line * factor.line_stride + step;
  const int64_t lines = std::min(TILE, factor.lines - line);
  alignas(64) uint32_t largest[TILE] = {};
  for (int64_t i = 0; i < lines; ++i) {
    __m512i most = _mm512_setzero_si512();
    for (int64_t at = 0; at < left; at += TILE)
      most = _mm512_max_epu32(most, magnitude(_mm512_maskz_loadu_ps(first(left - at), from + i * factor.line_stride + at)));
    largest[i] = _mm512_reduce_max_epu32(most);
  }
  __m512 scales;
  alignas(64) float times[TILE];
  _mm512_store_ps(times, multiples(_mm512_load_si512(largest), scales));
  wanted.scales(scales);
  const __m512i in_order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);  // packing takes eight bytes of either in turn
  for (int64_t at = 0, tile = 0; at < left; at += STEPS, tile += TILE_BYTES) {
    __m512i words[TILE];
    const __mmask16 low = first(left - at), high = first(left - at - TILE);
    for (int64_t i = 0; i < TILE; ++i) {
      const bool there = i < lines;
      const float* own = from + i * factor.line_stride + at;
      const __m512 by = _mm512_set1_ps(times[i]);
      const __m512 front = _mm512_mul_ps(_mm512_maskz_loadu_ps(there ? low : __mmask16(0), own), by);
      const __m512 back = _mm512_mul_ps(_mm512_maskz_loadu_ps(there ? high : __mmask16(0), own + TILE), by);
      const __m512i both = _mm512_packs_epi32(_mm512_cvtps_epi32(front), _mm512_cvtps_epi32(back));
      words[i] = _mm512_permutexvar_epi64(in_order, both);
    }
    if (wanted.by_line) store(words, wanted.by_line->tiles + tile);
    if (wanted.by_word) turn(words), store(words, wanted.by_word->tiles + tile);
  }
}

// The same of a factor whose lines are neighbours.
void pack_by_step(const Factor& factor, int64_t line, int64_t step, int64_t left, const Wanted& wanted) {
  const float* from = factor.numbers + line + step * factor.step_stride;
  const __mmask16 mask = first(factor.lines - line);
  __m512i most = _mm512_setzero_si512();
  for (int64_t at = 0; at < left; ++at)
    most = _mm512_max_epu32(most, magnitude(_mm512_maskz_loadu_ps(mask, from + at * factor.step_stride)));
  __m512 scales;
  const __m512 times = multiples(most, scales);
  wanted.scales(scales);
  for (int64_t at = 0, tile = 0; at < left; at += STEPS, tile += TILE_BYTES) {
    __m512i words[TILE];
    for (int64_t i = 0; i < TILE; ++i) {
      const float* own = from + (at + 2 * i) * factor.step_stride;
      const __m512 even = _mm512_maskz_loadu_ps(at + 2 * i < left ? mask : __mmask16(0), own);
      const __m512 odd = _mm512_maskz_loadu_ps(at + 2 * i + 1 < left ? mask : __mmask16(0), own + factor.step_stride);
      const __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps(even, times));
      const __m512i high = _mm512_cvtps_epi32(_mm512_mul_ps(odd, times));
      words[i] = _mm512_mask_blend_epi16(0xaaaaaaaau, low, _mm512_slli_epi32(high, 16));
    }
    if (wanted.by_word) store(words, wanted.by_word->tiles + tile);
    if (wanted.by_line) turn(words), store(words, wanted.by_line->tiles + tile);
  }
}

// Whether this CPU has what the sources that include this are compiled for.
inline bool supported() {
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

}  // namespace
