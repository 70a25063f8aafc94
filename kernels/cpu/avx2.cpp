// The 256-bit paths, from one source: AVX-VNNI where the compiler's flags allow it, plain AVX2 otherwise.
//
// A quarter of a step (32 bytes: 8 channels in the low nibbles, 8 in the high) is taken at a time, over chunks of
// 32 steps (4 KB of weights, which stay in L1); int32 sums wait in memory between chunks.
#include <immintrin.h>
#include "rows.h"

namespace {

constexpr int64_t CHUNK = 32;  // steps

inline __m256 load_scales(const Tile& tile, int64_t index) {
  if (tile.scale_dtype != BFLOAT16) return _mm256_loadu_ps(reinterpret_cast<const float*>(tile.scales) + index);
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(tile.scales + index * 2));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

inline __m256i four_codes(const int8_t* a) {
  int32_t four;
  std::memcpy(&four, a, 4);
  return _mm256_set1_epi32(four);
}

#if defined(__AVXVNNI__)
constexpr int MOST_ROWS = 6;  // 12 sums, two weight operands and one broadcast fill the 16 registers
constexpr bool WHOLE_BYTES = true;  // the sums of high nibbles are those of bytes until the group ends, as in avx512.cpp

// sum += four unsigned bytes of w times four signed bytes of x in each lane. By hand because gcc 12 keeps two copies of
// every sum alive with the intrinsic, and spills them.
inline void dot(__m256i& sum, __m256i w, __m256i x) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(w), "x"(x));
}

template <int ROWS>
inline void run_chunk(const uint8_t* w, const int8_t* a, int64_t stride, int64_t steps, int32_t* total) {
  const __m256i low = _mm256_set1_epi8(0x0f);
  __m256i sum[ROWS][2];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r)
    for (int j = 0; j < 2; ++j) sum[r][j] = _mm256_load_si256((const __m256i*)(total + r * PANEL + j * 16));
  for (int64_t step = 0; step < steps; ++step) {
    const __m256i word = _mm256_loadu_si256((const __m256i*)(w + step * STEP_BYTES));
    const __m256i w0 = _mm256_and_si256(word, low);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      const __m256i x = four_codes(a + r * stride + step * 4);
      dot(sum[r][0], w0, x);
      dot(sum[r][1], word, x);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r)
    for (int j = 0; j < 2; ++j) _mm256_store_si256((__m256i*)(total + r * PANEL + j * 16), sum[r][j]);
}
#else
constexpr int MOST_ROWS = 4;
constexpr bool WHOLE_BYTES = false;

// vpmaddubsw adds two products u8 * s8 into an int16 that saturates. Here u8 is a nibble, at most 15, and s8 a code,
// at least -128: |sum of two| <= 2 * 15 * 128 = 3840, and eight steps of them <= 30720 < 32768: nothing can saturate
// or wrap before vpmaddwd widens to int32. So the high nibble must be shifted down first (240 * 128 * 2 would not fit).
template <int ROWS>
inline void run_chunk(const uint8_t* w, const int8_t* a, int64_t stride, int64_t steps, int32_t* total) {
  const __m256i low = _mm256_set1_epi8(0x0f), ones = _mm256_set1_epi16(1);
  for (int64_t first = 0; first < steps; first += 8) {
    const int64_t last = std::min(steps, first + 8);
    __m256i sum[ROWS][2];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    for (int64_t step = first; step < last; ++step) {
      const __m256i word = _mm256_loadu_si256((const __m256i*)(w + step * STEP_BYTES));
      const __m256i w0 = _mm256_and_si256(word, low), w1 = _mm256_and_si256(_mm256_srli_epi16(word, 4), low);
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; ++r) {
        const __m256i x = four_codes(a + r * stride + step * 4);
        sum[r][0] = _mm256_add_epi16(sum[r][0], _mm256_maddubs_epi16(w0, x));
        sum[r][1] = _mm256_add_epi16(sum[r][1], _mm256_maddubs_epi16(w1, x));
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r)
      for (int j = 0; j < 2; ++j) {
        __m256i* t = (__m256i*)(total + r * PANEL + j * 16);
        _mm256_store_si256(t, _mm256_add_epi32(_mm256_load_si256(t), _mm256_madd_epi16(sum[r][j], ones)));
      }
  }
}
#endif

inline __m256i group_sum(const int32_t* total, int i) {
  const __m256i t = _mm256_load_si256((const __m256i*)(total + i));
  if (!WHOLE_BYTES || !(i & 16)) return t;
  return _mm256_srai_epi32(_mm256_sub_epi32(t, _mm256_load_si256((const __m256i*)(total + i - 16))), 4);
}

template <int ROWS>
inline void add_floats(const Tile& tile, int64_t g, const int32_t* total) {
  for (int i = 0; i < PANEL; i += 8) {
    const __m256 scale = load_scales(tile, g * PANEL + i);
    for (int r = 0; r < ROWS; ++r) {
      float* f = tile.sums + r * PANEL + i;
      const __m256 sum = _mm256_cvtepi32_ps(group_sum(total, r * PANEL + i));
      _mm256_store_ps(f, _mm256_add_ps(_mm256_load_ps(f), _mm256_mul_ps(sum, scale)));
    }
  }
}

template <int ROWS>
inline void add_integers(const Tile& tile, int64_t g, const int32_t* total) {
  for (int i = 0; i < PANEL; i += 8) {
    const __m256i multiple = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(tile.scales + g * PANEL + i)));
    for (int r = 0; r < ROWS; ++r) {
      __m256i* t = (__m256i*)(tile.totals + r * PANEL + i);
      const __m256i sum = group_sum(total, r * PANEL + i);
      _mm256_store_si256(t, _mm256_add_epi32(_mm256_load_si256(t), _mm256_mullo_epi32(sum, multiple)));
    }
  }
}

template <int ROWS>
void run_tile(const Tile& tile) {
  alignas(32) int32_t total[ROWS * PANEL];
  const bool folded = tile.scale_dtype == UINT8;
  std::fill(tile.sums, tile.sums + ROWS * PANEL, 0.0f);
  std::fill(tile.totals, tile.totals + ROWS * PANEL, 0);
  const char* ahead = tile.prefetch;
  for (int64_t g = 0; g < tile.groups; ++g) {
    for (int r = 0; r < ROWS; ++r) {
      const int32_t* start = tile.starts + (r * tile.groups + g) * 2;
      const __m256i low = _mm256_set1_epi32(start[0]), high = _mm256_set1_epi32(start[WHOLE_BYTES ? 1 : 0]);
      for (int i = 0; i < PANEL; i += 8) _mm256_store_si256((__m256i*)(total + r * PANEL + i), i & 16 ? high : low);
    }
    const int64_t begin = g * tile.group_steps, end = std::min(tile.steps, begin + tile.group_steps);
    for (int64_t step = begin; step < end; step += CHUNK) {
      const int64_t steps = std::min(CHUNK, end - step);
      for (int64_t i = 0; i < steps; ++i, ahead += tile.prefetch_stride) {
        _mm_prefetch(ahead, _MM_HINT_T0);
        if (tile.prefetch_stride == STEP_BYTES) _mm_prefetch(ahead + 64, _MM_HINT_T0);
      }
      for (int q = 0; q < 4; ++q)
        run_chunk<ROWS>(tile.weight + step * STEP_BYTES + q * 32, tile.codes + step * 4, tile.code_stride, steps,
                        total + (q >> 1) * 32 + (q & 1) * 8);
    }
    if (folded) add_integers<ROWS>(tile, g, total);
    else add_floats<ROWS>(tile, g, total);
  }
  if (folded) scale_totals(tile, ROWS);
}

void run_rows(const Tile& tile, int rows) {
  switch (rows) {
    case 1: return run_tile<1>(tile);
    case 2: return run_tile<2>(tile);
    case 3: return run_tile<3>(tile);
#if defined(__AVXVNNI__)
    case 5: return run_tile<5>(tile);
    case 6: return run_tile<6>(tile);
#endif
    default: return run_tile<4>(tile);
  }
}

void multiply(const Job& job, int64_t panel, int64_t, int64_t begin, int64_t end, int64_t next) {
  multiply_rows<MOST_ROWS>(job, panel, begin, end, next, stream_ahead(), run_rows);
}

double peak(int64_t rounds) {
  __m256i sum[12] = {}, w = _mm256_setzero_si256(), x = w;
  for (int64_t round = 0; round < 2 * rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) {
#if defined(__AVXVNNI__)
      dot(sum[i], w, x);
#else
      sum[i] = _mm256_add_epi16(sum[i], _mm256_maddubs_epi16(w, x));
#endif
      asm volatile("" : "+x"(sum[i]), "+x"(w), "+x"(x));  // every product is computed
    }
  }
  return double(rounds) * 24 * 64;
}

}  // namespace

#if defined(__AVXVNNI__)
const Path AVXVNNI_PATH{"avxvnni", quantize_rows, multiply, peak, BLOCK_ROWS, 12, 1};
#else
const Path AVX2_PATH{"avx2", quantize_rows, multiply, peak, BLOCK_ROWS, 12, 1};
#endif
