// bfloat16 layers with AVX2: a 32-bit word of weights is two floats, one mask or shift away, times float activations.
#include <immintrin.h>
#include "bfloat16_tile.h"

namespace {

constexpr int MOST = 4;            // 4 tokens by 16 channels: 8 sums, 4 vectors of weights, one broadcast
constexpr int64_t CHUNK = 32;      // steps: 8 KB of weights stay in L1 while their four quarters are taken

inline __m256 low(__m256i word) { return _mm256_castsi256_ps(_mm256_slli_epi32(word, 16)); }
inline __m256 high(__m256i word) {
  return _mm256_castsi256_ps(_mm256_and_si256(word, _mm256_set1_epi32(int32_t(0xffff0000))));
}

template <int TOKENS>
void sum_quarter(const char* w, const char* x, int64_t stride, int64_t steps, float* f) {
  __m256 sum[TOKENS][2];
  for (int t = 0; t < TOKENS; ++t)
    for (int j = 0; j < 2; ++j) sum[t][j] = _mm256_load_ps(f + t * PANEL + j * 8);
  for (int64_t step = 0; step < steps; ++step, w += STEP_BYTES, x += 8) {
    const __m256i w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    const __m256i w1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32));
    const __m256 even[2] = {low(w0), low(w1)}, odd[2] = {high(w0), high(w1)};
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) {
      const float* two = reinterpret_cast<const float*>(x + t * stride);
      const __m256 first = _mm256_broadcast_ss(two), second = _mm256_broadcast_ss(two + 1);
      for (int j = 0; j < 2; ++j) {
        sum[t][j] = _mm256_fmadd_ps(even[j], first, sum[t][j]);
        sum[t][j] = _mm256_fmadd_ps(odd[j], second, sum[t][j]);
      }
    }
  }
  for (int t = 0; t < TOKENS; ++t)
    for (int j = 0; j < 2; ++j) _mm256_store_ps(f + t * PANEL + j * 8, sum[t][j]);
}

void multiply(const Job& job, int64_t panel, int64_t begin, int64_t end) {
  multiply_tiles<MOST>(
      job, panel, begin, end,
      [&](int tokens, const char* w, const char* x, int64_t steps, float* sums, const char* ahead, int64_t ahead_stride,
          bool) {
        for (int64_t first = 0; first < steps; first += CHUNK) {
          const int64_t some = std::min(CHUNK, steps - first);
          for (int64_t i = 0; i < some * ahead_stride; i += 64) _mm_prefetch(ahead + first * ahead_stride + i, _MM_HINT_T0);
          for (int quarter = 0; quarter < 4; ++quarter) {
            const char *from = w + first * STEP_BYTES + quarter * 64, *tokens_from = x + first * job.x_step;
            float* f = sums + quarter * 16;
            switch (tokens) {
              case 1: sum_quarter<1>(from, tokens_from, job.x_stride, some, f); break;
              case 2: sum_quarter<2>(from, tokens_from, job.x_stride, some, f); break;
              case 3: sum_quarter<3>(from, tokens_from, job.x_stride, some, f); break;
              default: sum_quarter<4>(from, tokens_from, job.x_stride, some, f);
            }
          }
        }
      });
}

}  // namespace

const bfloat16::Path bfloat16::AVX2_PATH{"avx2", 4, multiply};
