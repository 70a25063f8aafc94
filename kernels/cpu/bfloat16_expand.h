// Compressed steps of bfloat16 layers restored to the plain layout (bfloat16.h), with AVX512.
// Everything has internal linkage, as in rows.h.
#pragma once
#include <immintrin.h>
#include <cstdint>

namespace {

// The upper bytes that a panel's table has.
struct Upper {
  __m512i bytes;

  explicit Upper(const uint8_t* table)
      : bytes(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)))) {}

  // Half 0 or 1 of the step at `w`: 128 bytes, `to` aligned to 64.
  void restore(const char* w, int64_t half, char* to) const {
    const __m512i lower = _mm512_loadu_si512(w + 64 * half), both = _mm512_loadu_si512(w + 128);
    const __m512i number = _mm512_and_si512(half ? _mm512_srli_epi16(both, 4) : both, _mm512_set1_epi8(15));
    const __m512i high = _mm512_shuffle_epi8(bytes, number);
    _mm512_store_si512(to, _mm512_unpacklo_epi8(lower, high));
    _mm512_store_si512(to + 64, _mm512_unpackhi_epi8(lower, high));
  }
};

}  // namespace
