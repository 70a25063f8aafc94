// The products of attention with AMX, for 16 rows at a time. A panel's 64 columns of pairs are four operands as they lie.
#include <immintrin.h>
#include "../tiles.h"
#include "job.h"

namespace {

constexpr int64_t PANEL = 64, PAIRS = 2 * PANEL;  // as in avx512.cpp
constexpr int64_t DEPTH = 32;                     // rows of b that one instruction takes: 16 pairs
constexpr int ROWS = 16;

const TileConfiguration CONFIGURATION;

// c[16, 16 C] = c + a[16, 32 depths] b; sums in registers 0..3, a in 4, b in 6 and 7.
template <int C>
void product(const Bfloat16* a, int64_t a_stride, const Bfloat16* b, int64_t depths, float* c, int64_t c_stride, bool add) {
  const int64_t rows = a_stride * 2, pairs = PAIRS * 2, sums = c_stride * 4;  // bytes
#define EACH_SUM(DO) \
  DO(0, c, sums);    \
  DO(1, c + 16, sums);
#define EACH_MORE(DO)  \
  DO(2, c + 32, sums); \
  DO(3, c + 48, sums);
  if (add) {
    EACH_SUM(TILE_LOAD)
    if constexpr (C == 4) { EACH_MORE(TILE_LOAD) }
  } else {
    TILE_ZERO(0);
    TILE_ZERO(1);
    if constexpr (C == 4) {
      TILE_ZERO(2);
      TILE_ZERO(3);
    }
  }
  for (int64_t depth = 0; depth < depths; ++depth, a += DEPTH, b += DEPTH / 2 * PAIRS) {
    TILE_LOAD(4, a, rows);
    TILE_LOAD(6, b, pairs);
    TILE_MULTIPLY_BFLOAT16(0, 4, 6);
    TILE_LOAD(7, b + 32, pairs);
    TILE_MULTIPLY_BFLOAT16(1, 4, 7);
    if constexpr (C == 4) {
      TILE_LOAD(6, b + 64, pairs);
      TILE_MULTIPLY_BFLOAT16(2, 4, 6);
      TILE_LOAD(7, b + 96, pairs);
      TILE_MULTIPLY_BFLOAT16(3, 4, 7);
    }
  }
  EACH_SUM(TILE_STORE)
  if constexpr (C == 4) { EACH_MORE(TILE_STORE) }
}

}  // namespace

void tiles_begin() { TILE_CONFIGURE(CONFIGURATION); }
void tiles_end() { TILE_RELEASE(); }

void tiles_products(int64_t columns, const Bfloat16* a, int64_t a_stride, const Bfloat16* b, int64_t panel_stride,
                    int64_t depths, float* c, int64_t c_stride, const float* factors) {
  if (factors)
    for (int r = 0; r < ROWS; ++r)
      for (int64_t i = 0; i < columns; i += 16) {
        float* sums = c + r * c_stride + i;
        _mm512_storeu_ps(sums, _mm512_mul_ps(_mm512_loadu_ps(sums), _mm512_set1_ps(factors[r])));
      }
  for (int64_t at = 0; at < columns; at += PANEL, b += panel_stride)
    (columns - at > PANEL / 2 ? product<4> : product<2>)(a, a_stride, b, depths, c + at, c_stride, factors != nullptr);
}
