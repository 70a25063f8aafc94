// Sign bits and their mismatches, from one source: VPOPCNTDQ where the flags allow it, a nibble table in AVX2, and
// plain arithmetic for any CPU.
//
// Without a population count in the instruction set, counts are kept in bytes for 31 words (31 * 8 = 248 fits) and then
// widened to the 32-bit lanes that they belong to.
#include <algorithm>
#include <cstring>
#include "job.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512VPOPCNTDQ__)
using Vector = __m512i;
constexpr int64_t CHUNK = int64_t(1) << 40;  // lanes are 32 bits from the start
inline Vector load(const uint32_t* p) { return _mm512_loadu_si512(p); }
inline void store(int32_t* p, Vector v) { _mm512_storeu_si512(p, v); }
inline Vector spread(uint32_t word) { return _mm512_set1_epi32(int32_t(word)); }
inline Vector add(Vector a, Vector b) { return _mm512_add_epi32(a, b); }
inline Vector count(Vector sum, Vector a, Vector b) { return add(sum, _mm512_popcnt_epi32(_mm512_xor_si512(a, b))); }
inline Vector widen(Vector sum) { return sum; }
#elif defined(__AVX2__)
using Vector = __m256i;
constexpr int64_t CHUNK = 31;
inline Vector load(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const Vector*>(p)); }
inline void store(int32_t* p, Vector v) { _mm256_storeu_si256(reinterpret_cast<Vector*>(p), v); }
inline Vector spread(uint32_t word) { return _mm256_set1_epi32(int32_t(word)); }
inline Vector add(Vector a, Vector b) { return _mm256_add_epi32(a, b); }
inline Vector count(Vector sum, Vector a, Vector b) {
  const Vector table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,
                                        0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const Vector low = _mm256_set1_epi8(15), x = _mm256_xor_si256(a, b);
  const Vector lows = _mm256_shuffle_epi8(table, _mm256_and_si256(x, low));
  const Vector highs = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(x, 4), low));
  return _mm256_add_epi8(sum, _mm256_add_epi8(lows, highs));
}
inline Vector widen(Vector sum) {  // four bytes a lane; 2 * 248 fits the 16 bits between
  return _mm256_madd_epi16(_mm256_maddubs_epi16(sum, _mm256_set1_epi8(1)), _mm256_set1_epi16(1));
}
#else
typedef uint32_t Vector __attribute__((vector_size(16)));
constexpr int64_t CHUNK = 31;
inline Vector load(const uint32_t* p) {
  Vector v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline void store(int32_t* p, Vector v) { std::memcpy(p, &v, sizeof(v)); }
inline Vector spread(uint32_t word) { return Vector{word, word, word, word}; }
inline Vector add(Vector a, Vector b) { return a + b; }
inline Vector count(Vector sum, Vector a, Vector b) {
  Vector x = a ^ b;
  x -= x >> 1 & 0x55555555u;
  x = (x & 0x33333333u) + (x >> 2 & 0x33333333u);
  return sum + ((x + (x >> 4)) & 0x0f0f0f0fu);  // a count of 0..8 in each byte
}
inline Vector widen(Vector sum) {
  sum = (sum & 0x00ff00ffu) + (sum >> 8 & 0x00ff00ffu);
  return (sum & 0xffffu) + (sum >> 16);
}
#endif

constexpr int64_t LANES = sizeof(Vector) / sizeof(uint32_t);
constexpr bool WIDENS = CHUNK < 32;

template <int ROWS, int VECTORS>
void count_part(const BinaryTile& tile, int64_t lane) {
  Vector total[ROWS][VECTORS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) total[r][v] = spread(0);
  for (int64_t first = 0; first < tile.words; first += CHUNK) {
    const int64_t last = std::min(tile.words, first + CHUNK);
    Vector sum[ROWS][VECTORS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = spread(0);
    for (int64_t i = first; i < last; ++i) {
      Vector a[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) a[v] = load(tile.lanes + tile.offsets[i] + lane + v * LANES);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const Vector b = spread(tile.rows[r * tile.row_stride + i]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = count(sum[r][v], a[v], b);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) total[r][v] = WIDENS ? add(total[r][v], widen(sum[r][v])) : sum[r][v];
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) store(tile.counts + r * BINARY_LANES + lane + v * LANES, total[r][v]);
}

// 16 registers hold the sums of 4 rows by 4 vectors (AVX512); with 16 registers in all, 2 vectors a time.
constexpr int MOST_VECTORS = WIDENS ? 2 : 4;

template <int ROWS>
void count_rows(const BinaryTile& tile) {
  int64_t lane = 0;
  for (; lane + (MOST_VECTORS - 1) * LANES < tile.lane_count; lane += MOST_VECTORS * LANES)
    count_part<ROWS, MOST_VECTORS>(tile, lane);
  switch ((tile.lane_count - lane + LANES - 1) / LANES) {
    case 3: return count_part<ROWS, 3>(tile, lane);
    case 2: return count_part<ROWS, 2>(tile, lane);
    case 1: return count_part<ROWS, 1>(tile, lane);
    default: return;
  }
}

void count_tile(const BinaryTile& tile) {
  switch (tile.row_count) {
    case 1: return count_rows<1>(tile);
    case 2: return count_rows<2>(tile);
    case 3: return count_rows<3>(tile);
    default: return count_rows<4>(tile);
  }
}

void pack_pixels(const float* x, int64_t channel_stride, int64_t channels, int64_t count, uint32_t* __restrict out) {
  constexpr int64_t BLOCK = 512;  // long enough for streams of reads, short enough for the words to stay in L1
  for (int64_t first = 0; first < count; first += BLOCK) {
    const int64_t pixels = std::min(BLOCK, count - first);
    uint32_t words[BLOCK];
    std::fill(words, words + pixels, 0u);
    for (int64_t c = 0; c < channels; ++c) {
      const float* from = x + c * channel_stride + first;
      const uint32_t bit = uint32_t(1) << c;
      for (int64_t i = 0; i < pixels; ++i) words[i] |= from[i] >= 0.0f ? bit : 0;  // false for NaN, true for -0
    }
    std::memcpy(out + first, words, size_t(pixels) * sizeof(uint32_t));
  }
}

void pack_row(const float* x, int64_t k, uint32_t* out) {
  for (int64_t first = 0; first < k; first += WORD) {
    uint32_t word = 0;
    int64_t i = 0;
    const int64_t count = std::min(WORD, k - first);
#if defined(__AVX2__)
    for (; i + 8 <= count; i += 8) {
      const __m256 eight = _mm256_loadu_ps(x + first + i);
      word |= uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(eight, _mm256_setzero_ps(), _CMP_GE_OQ))) << i;
    }
#endif
    for (; i < count; ++i) word |= uint32_t(x[first + i] >= 0.0f) << i;
    *out++ = word;
  }
}

// Lanes [first, last) of one vector. Stretches of image rows are short and start anywhere: they are masked, not copied,
// so that counts are read as the whole vectors they were just stored as (a load across two stores waits for both).
#if defined(__AVX512F__)
struct Part {
  __mmask16 mask;
  Part(int64_t first, int64_t last)
      : mask(__mmask16((last < 16 ? (1u << last) - 1 : 0xffffu) & (first > 0 ? ~0u << first : ~0u))) {}
  __m512i sum(const int32_t* starts, const int32_t* counts) const {  // starts - 2 * counts
    const __m512i two = _mm512_slli_epi32(_mm512_loadu_si512(counts), 1);
    return _mm512_sub_epi32(_mm512_maskz_loadu_epi32(mask, starts), two);
  }
  void keep(float* y, __m512 v) const { _mm512_mask_storeu_ps(y, mask, v); }
};
inline __m512 spread_float(float v) { return _mm512_set1_ps(v); }
inline __m512 scaled(__m512i sum, __m512 scale) { return _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale); }
inline __m512 plus(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
inline __m512 compared(__m512i sum, __m512i least) {
  return _mm512_mask_blend_ps(_mm512_cmplt_epi32_mask(sum, least), _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f));
}
#elif defined(__AVX2__)
struct Part {
  __m256i mask;
  Part(int64_t first, int64_t last) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i before = _mm256_cmpgt_epi32(_mm256_set1_epi32(int32_t(std::max<int64_t>(first, 0))), lane);
    const __m256i until = _mm256_cmpgt_epi32(_mm256_set1_epi32(int32_t(std::min<int64_t>(last, 8))), lane);
    mask = _mm256_andnot_si256(before, until);
  }
  __m256i sum(const int32_t* starts, const int32_t* counts) const {
    const __m256i two = _mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(counts)), 1);
    return _mm256_sub_epi32(_mm256_maskload_epi32(starts, mask), two);
  }
  void keep(float* y, __m256 v) const { _mm256_maskstore_ps(y, mask, v); }
};
inline __m256 spread_float(float v) { return _mm256_set1_ps(v); }
inline __m256 scaled(__m256i sum, __m256 scale) { return _mm256_mul_ps(_mm256_cvtepi32_ps(sum), scale); }
inline __m256 plus(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
inline __m256 compared(__m256i sum, __m256i least) {
  const __m256 below = _mm256_castsi256_ps(_mm256_cmpgt_epi32(least, sum));
  return _mm256_blendv_ps(_mm256_set1_ps(1.0f), _mm256_set1_ps(-1.0f), below);
}
#endif

// Two roundings, product and sum, as torch has them; this file is compiled without contraction.
void finish_places(const int32_t* counts, const Stretch* stretches, int64_t stretch_count, const int32_t* starts,
                   float scale, const float* bias, const int32_t* threshold, float* y) {
  for (const Stretch* s = stretches; s < stretches + stretch_count; ++s) {
#if defined(__AVX2__)
    for (int64_t lane = s->lane / LANES * LANES; lane < s->lane + s->count; lane += LANES) {
      const int64_t ahead = lane - s->lane;  // negative in the first vector, whose first lanes are masked
      const Part part(-ahead, s->count - ahead);
      const Vector sum = part.sum(starts + s->start + ahead, counts + lane);
      float* to = y + s->out + ahead;
      if (threshold) part.keep(to, compared(sum, spread(uint32_t(*threshold))));
      else if (bias) part.keep(to, plus(scaled(sum, spread_float(scale)), spread_float(*bias)));
      else part.keep(to, scaled(sum, spread_float(scale)));
    }
#else
    for (int64_t i = 0; i < s->count; ++i) {
      const int32_t sum = starts[s->start + i] - 2 * counts[s->lane + i];
      if (threshold) y[s->out + i] = sum >= *threshold ? 1.0f : -1.0f;
      else y[s->out + i] = bias ? float(sum) * scale + *bias : float(sum) * scale;
    }
#endif
  }
}

void finish_channels(const int32_t* __restrict counts, int32_t start, int64_t count, const float* __restrict scale,
                     const float* __restrict bias, const int32_t* __restrict thresholds, float* __restrict y) {
  if (thresholds)
    for (int64_t i = 0; i < count; ++i) y[i] = start - 2 * counts[i] >= thresholds[i] ? 1.0f : -1.0f;
  else if (bias)
    for (int64_t i = 0; i < count; ++i) y[i] = float(start - 2 * counts[i]) * scale[i] + bias[i];
  else
    for (int64_t i = 0; i < count; ++i) y[i] = float(start - 2 * counts[i]) * scale[i];
}

double peak(int64_t rounds) {
  constexpr int VECTORS = WIDENS ? 4 : 16;
  Vector sum[VECTORS] = {}, a = spread(0), b = spread(1);
  for (int64_t round = 0; round < rounds * 16 / VECTORS; ++round) {
#pragma GCC unroll 16
    for (int i = 0; i < VECTORS; ++i) {
      sum[i] = count(sum[i], a, b);
#if defined(__x86_64__)
      asm volatile("" : "+x"(sum[i]), "+x"(a), "+x"(b));  // every count is computed
#else
      asm volatile("" : "+w"(sum[i]), "+w"(a), "+w"(b));
#endif
    }
  }
  return double(rounds) * 16 * 32 * LANES;
}

}  // namespace

#if defined(__AVX512VPOPCNTDQ__)
#define THIS_PATH AVX512_BINARY
#elif defined(__AVX2__)
#define THIS_PATH AVX2_BINARY
#else
#define THIS_PATH PORTABLE_BINARY
#endif
const BinaryPath THIS_PATH{pack_pixels, pack_row, count_tile, finish_places, finish_channels, peak};
