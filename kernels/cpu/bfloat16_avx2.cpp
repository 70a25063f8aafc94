// bfloat16 layers with AVX2: a 32-bit word of weights is two floats, one mask or shift away, times float activations.
#include <immintrin.h>
#include "bfloat16_tile.h"

namespace {

constexpr int64_t CHUNK = 32;  // steps: 8 KB of weights stay in L1 while their parts are taken

inline __m256 low(__m256i word) { return _mm256_castsi256_ps(_mm256_slli_epi32(word, 16)); }
inline __m256 high(__m256i word) {
  return _mm256_castsi256_ps(_mm256_and_si256(word, _mm256_set1_epi32(int32_t(0xffff0000))));
}

// TOKENS by 8 * WORDS channels are eight sums (six of three tokens), so that additions do not wait for each other. What is
// used more often stays in registers: one or two tokens, or else the weights.
template <int TOKENS, int WORDS>
void sum_part(const char* w, const char* x, int64_t stride, int64_t steps, float* f, const char* ahead,
              int64_t ahead_stride) {
  __m256 sum[TOKENS][WORDS];
  for (int t = 0; t < TOKENS; ++t)
    for (int j = 0; j < WORDS; ++j) sum[t][j] = _mm256_load_ps(f + t * PANEL + j * 8);
  for (int64_t step = 0; step < steps; ++step, w += STEP_BYTES, x += 8, ahead += ahead_stride) {
    for (int line = 0; line < WORDS / 2; ++line) _mm_prefetch(ahead + line * 64, _MM_HINT_T0);
    const auto token = [&](int t, int i) {
      return _mm256_broadcast_ss(reinterpret_cast<const float*>(x + t * stride) + i);
    };
    const auto word = [&](int j) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + j * 32)); };
    const auto add = [&](int t, int j, __m256 even, __m256 odd, __m256 first, __m256 second) {
      sum[t][j] = _mm256_fmadd_ps(even, first, sum[t][j]);
      sum[t][j] = _mm256_fmadd_ps(odd, second, sum[t][j]);
    };
    if constexpr (TOKENS <= 2) {
      __m256 two[TOKENS][2];
      for (int t = 0; t < TOKENS; ++t) two[t][0] = token(t, 0), two[t][1] = token(t, 1);
#pragma GCC unroll 8
      for (int j = 0; j < WORDS; ++j)
        for (int t = 0; t < TOKENS; ++t) add(t, j, low(word(j)), high(word(j)), two[t][0], two[t][1]);
    } else {
      const __m256 even[2] = {low(word(0)), low(word(1))}, odd[2] = {high(word(0)), high(word(1))};
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; ++t) {
        const __m256 first = token(t, 0), second = token(t, 1);
        for (int j = 0; j < 2; ++j) add(t, j, even[j], odd[j], first, second);
      }
    }
  }
  for (int t = 0; t < TOKENS; ++t)
    for (int j = 0; j < WORDS; ++j) _mm256_store_ps(f + t * PANEL + j * 8, sum[t][j]);
}

template <int TOKENS, int WORDS>
void sum_chunk(const char* w, const char* x, int64_t stride, int64_t steps, float* f, const char* ahead,
               int64_t ahead_stride) {
  for (int j = 0; j < 8; j += WORDS)
    sum_part<TOKENS, WORDS>(w + j * 32, x, stride, steps, f + j * 8, ahead + j * 32, ahead_stride);
}

constexpr decltype(&sum_chunk<1, 8>) CHUNKS[] = {sum_chunk<1, 8>, sum_chunk<2, 4>, sum_chunk<3, 2>, sum_chunk<4, 2>};

// Compressed steps into the plain layout, see bfloat16.h.
void expand(const char* w, const uint8_t* table, int64_t steps, char* to) {
  const __m256i upper = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  const __m256i nibble = _mm256_set1_epi8(15);
  for (int64_t step = 0; step < steps; ++step, w += COMPRESSED_BYTES, to += STEP_BYTES)
    for (int part = 0; part < 4; ++part) {  // 32 bytes of a half
      const auto load = [&](int64_t at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + at)); };
      const __m256i lower = load(32 * part), both = load(128 + 32 * (part % 2));
      const __m256i number = _mm256_and_si256(part / 2 ? _mm256_srli_epi16(both, 4) : both, nibble);
      const __m256i high = _mm256_shuffle_epi8(upper, number);
      char* own = to + 128 * (part / 2) + 32 * (part % 2);
      _mm256_store_si256(reinterpret_cast<__m256i*>(own), _mm256_unpacklo_epi8(lower, high));
      _mm256_store_si256(reinterpret_cast<__m256i*>(own + 64), _mm256_unpackhi_epi8(lower, high));
    }
}

struct Own {
  static constexpr int MOST = 4;

  struct Block {
    alignas(32) char plain[bfloat16::BLOCK_STEPS * STEP_BYTES];

    void prepare(const Compressed& own) {
      expand(own.w, own.table, own.steps, plain);
      for (const int64_t* value = own.rest; value < own.rest_end; ++value) put(*value, plain + own.step(value) * STEP_BYTES);
    }
  };

  static void add(const Job& job, const Part& part) {
    for (int64_t first = 0; first < part.steps; first += CHUNK)
      CHUNKS[part.tokens - 1](part.w + first * STEP_BYTES, part.x + first * job.x_step, job.x_stride,
                              std::min(CHUNK, part.steps - first), part.sums, part.ahead + first * part.ahead_stride,
                              part.ahead_stride);
  }

  static void add_compressed(const Job& job, Part part, const Block& block) {
    part.w = block.plain;
    add(job, part);
  }
};

}  // namespace

const bfloat16::Path bfloat16::AVX2_PATH{"avx2", 4, multiply_tiles<Own>};
