// What the AMX path's loops over few and over many rows share: the shape of tiles, and sums on their way to the epilogue.
#pragma once
#include <immintrin.h>
#include "rows.h"
#include "tiles.h"

namespace {

constexpr int64_t TILE = 16;          // rows of a tile, channels of a tile of weights
constexpr int64_t DEPTH = 16;         // steps of a tile: 64 inputs
constexpr int64_t TILE_BYTES = 1024;
constexpr int64_t SUMS = TILE * TILE;

template <int R>
inline void clear_sums() {
  TILE_ZERO(0);
  TILE_ZERO(1);
  if constexpr (R == 2) {
    TILE_ZERO(2);
    TILE_ZERO(3);
  }
}

// Tiles 0 to 2 R - 1 of sums, one behind the other: int32 [R][2][16][16], of 16 R rows and 32 channels.
template <int R>
inline void store_sums(int32_t* to) {
  TILE_STORE(0, to, 64);
  TILE_STORE(1, to + SUMS, 64);
  if constexpr (R == 2) {
    TILE_STORE(2, to + 2 * SUMS, 64);
    TILE_STORE(3, to + 3 * SUMS, 64);
  }
}

// A folded group's multiples: codes times them are `(word's nibbles ^ turned) * times - minus`. Nibbles are code + 8; of a negative
// multiple they are turned over to 7 - code, and times is its size. A 16-bit lane holds two nibbles: their products stay below 256,
// so no carry passes between them, and what is taken away is right in eight bits, since -8 * 16 and 8 * 15 are.
struct Multiples {
  __m512i turned[4], times[4], minus[4];  // of 16 channels each

  Multiples(const Tile& tile, int64_t group) {
    for (int i = 0; i < 4; ++i) {
      const char* own = tile.scales + group * PANEL + i * 16;
      const __m512i multiples = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(own)));
      const __m512i negative = _mm512_srai_epi32(multiples, 31), size = _mm512_abs_epi32(multiples);
      turned[i] = _mm512_and_si512(negative, _mm512_set1_epi8(15));
      times[i] = _mm512_mullo_epi32(size, _mm512_set1_epi32(0x00010001));
      const __m512i middle = _mm512_add_epi32(_mm512_set1_epi32(8), negative);  // of the nibbles: 8, or 7 where they are turned
      minus[i] = _mm512_mullo_epi32(_mm512_mullo_epi32(size, middle), _mm512_set1_epi32(0x01010101));
    }
  }
};

inline __m512 scales_at(const char* scales, Dtype dtype, int64_t i) {
  if (dtype == FLOAT32) return _mm512_loadu_ps(reinterpret_cast<const float*>(scales) + i);
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales + 2 * i));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Up to 16 rows of a panel's sums, [2][...][2][16][16] with `apart` bytes between its halves, as the epilogue wants them. Totals
// over all inputs get a scale a channel here, as in scale_totals.
inline void gather_rows(const char* own, int64_t apart, const char* scales, Dtype dtype, bool whole, int64_t rows,
                        float* out) {
  for (int i = 0; i < 4; ++i) {
    const char* from = own + i / 2 * apart + i % 2 * SUMS * 4;
    const __m512 scale = whole ? scales_at(scales, dtype, i * TILE) : _mm512_setzero_ps();
    for (int64_t r = 0; r < rows; ++r) {
      const __m512i sum = _mm512_load_si512(from + r * 64);
      const __m512 scaled = _mm512_add_ps(_mm512_setzero_ps(), _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale));
      _mm512_store_ps(out + r * PANEL + i * TILE, whole ? scaled : _mm512_castsi512_ps(sum));
    }
  }
}

}  // namespace
