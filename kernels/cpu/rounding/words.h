// Factors of a product as words, pairs of neighbouring steps of a line: 16 lines, or 16 words of a line, in a vector.
// Everything has internal linkage, as in vectors.h.
#pragma once
#include <immintrin.h>
#include <algorithm>
#include <cstdint>

namespace {

// A tile is 16 lines of 32 steps, or as many words across.
constexpr int64_t TILE = 16, STEPS = 32, TILE_BYTES = 1024;

inline __mmask16 first(int64_t count) { return __mmask16((1u << std::clamp<int64_t>(count, 0, 16)) - 1u); }

// words[i] of lane j become words[j] of lane i.
inline void turn(__m512i (&words)[TILE]) {
  __m512i half[TILE];
  for (int i = 0; i < TILE; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(words[i], words[i + 1]), b = _mm512_unpackhi_epi32(words[i], words[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(words[i + 2], words[i + 3]);
    const __m512i d = _mm512_unpackhi_epi32(words[i + 2], words[i + 3]);
    half[i] = _mm512_unpacklo_epi64(a, c), half[i + 1] = _mm512_unpackhi_epi64(a, c);
    half[i + 2] = _mm512_unpacklo_epi64(b, d), half[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  for (int i = 0; i < 4; ++i) {  // half[4 q + i] has lanes i, 4 + i, 8 + i, 12 + i of words 4 q .. 4 q + 3
    const __m512i a = _mm512_shuffle_i32x4(half[i], half[4 + i], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(half[8 + i], half[12 + i], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(half[i], half[4 + i], 0xdd);
    const __m512i d = _mm512_shuffle_i32x4(half[8 + i], half[12 + i], 0xdd);
    words[i] = _mm512_shuffle_i32x4(a, b, 0x88), words[8 + i] = _mm512_shuffle_i32x4(a, b, 0xdd);
    words[4 + i] = _mm512_shuffle_i32x4(c, d, 0x88), words[12 + i] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
}

inline void store(const __m512i (&words)[TILE], char* tile) {
  for (int64_t i = 0; i < TILE; ++i) _mm512_store_si512(tile + i * 64, words[i]);
}

}  // namespace
