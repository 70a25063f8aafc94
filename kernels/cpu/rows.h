// Row work shared by every code path: per-token quantization, row tiles, and the epilogue that rounds and stores.
//
// The loops here are plain C++ that the compiler vectorizes with the flags of the including file; everything has
// internal linkage, so code compiled for a newer instruction set can never be linked into an older path.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>
#if defined(__F16C__) || defined(__AVX512BW__)
#include <immintrin.h>
#endif
#include "job.h"
#include "stream.h"

namespace {

// Rows quantized at a time: bounds the scratch, and keeps codes in L2/L3. A multiple of 12, and not below 512, so that
// a prompt of that length does not leave 8 rows for which all weights are read once more.
constexpr int64_t BLOCK_ROWS = 516;

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = uint32_t(h & 0x8000) << 16, body = h & 0x7fff;
  if (body >= 0x7c00) return from_bits(sign | 0x7f800000 | (body & 0x3ff) << 13);  // infinity, NaN
  // Exponent and mantissa moved into place are 2**112 too small; the product is exact, subnormal halves included.
  return from_bits(sign | to_bits(from_bits(body << 13) * from_bits(0x77800000)));
#endif
}

inline uint16_t float_to_half(float value) {
#if defined(__F16C__)
  return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000, body = bits & 0x7fffffff;
  if (body > 0x7f800000) return uint16_t(sign | 0x7e00 | (body >> 13 & 0x3ff));  // NaN stays quiet
  if (body >= 0x477ff000) return uint16_t(sign | 0x7c00);                        // rounds past 65504
  if (body < 0x38800000)  // subnormal half: adding 0.5 leaves the rounded multiple of 2**-24 in the low mantissa bits
    return uint16_t(sign | (to_bits(from_bits(body) + 0.5f) - 0x3f000000));
  return uint16_t(sign | ((body - 0x38000000 + 0xfff + (body >> 13 & 1)) >> 13));
#endif
}

inline float bfloat16_to_float(uint16_t h) { return from_bits(uint32_t(h) << 16); }

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

struct Float32 {
  using Storage = uint32_t;
  static constexpr uint32_t MAGNITUDE = 0x7fffffff, INFINITE = 0x7f800000;
  static float load(Storage s) { return from_bits(s); }
  static Storage store(float v) { return to_bits(v); }
};

struct BFloat16 {
  using Storage = uint16_t;
  static constexpr uint16_t MAGNITUDE = 0x7fff, INFINITE = 0x7f80;
  static float load(Storage s) { return bfloat16_to_float(s); }
  static Storage store(float v) { return float_to_bfloat16(v); }
};

struct Float16 {
  using Storage = uint16_t;
  static constexpr uint16_t MAGNITUDE = 0x7fff, INFINITE = 0x7c00;
  static float load(Storage s) { return half_to_float(s); }
  static Storage store(float v) { return float_to_half(v); }
};

// e**x as reference.exponential computes it, operation for operation: 2**n times a polynomial (Cephes' expf) of the rest.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;  // n in the low bits of the mantissa
  const float f = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f, p = p * f + 8.3334519073e-3f, p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f, p = p * f + 5.0000001201e-1f;
  return ((p * (f * f) + f) + 1.0f) * from_bits((to_bits(shifted) + 127) << 23);
}

// out = silu(gate) * up in fp32, rounded once to the activations' dtype. Both are fetched ahead: of many rows they come from memory,
// where they lie in stretches too short for the CPU to do that well.
template <class T>
void gate_row(const typename T::Storage* gate, const typename T::Storage* up, int64_t k,
              typename T::Storage* __restrict out) {
  constexpr int64_t LINE = 64 / sizeof(gate[0]), PART = 8 * LINE, AHEAD = FAR_AHEAD / sizeof(gate[0]);
  for (int64_t first = 0; first < k; first += PART) {
    const int64_t end = std::min(k, first + PART);
    for (int64_t i = first; i < end; i += LINE)
      __builtin_prefetch(gate + i + AHEAD, 0, 2), __builtin_prefetch(up + i + AHEAD, 0, 2);
    for (int64_t i = first; i < end; ++i) {
      const float g = T::load(gate[i]);
      out[i] = T::store(g / (1.0f + exponential(-g)) * T::load(up[i]));
    }
  }
}

// codes[i] = rint(x[i] * inverse), for |x[i] * inverse| of at most 127 * (1 + 2**-22): adding 1.5 * 2**23 rounds to the nearest
// integer (ties to even) and leaves it in the low bits of the mantissa.
template <class T>
inline void encode(const typename T::Storage* x, int64_t k, float inverse, int8_t* __restrict codes) {
  int64_t i = 0;
#if defined(__AVX512BW__)
  // Upper halves of the 32-bit words are the odd values, shifted ones the even; two codes make 16 bits in order again.
  if constexpr (std::is_same_v<T, BFloat16>) {
    const __m512 factor = _mm512_set1_ps(inverse), magic = _mm512_set1_ps(12582912.0f);
    const __m512i upper = _mm512_set1_epi32(int32_t(0xffff0000)), byte = _mm512_set1_epi32(255);
    for (; i + 32 <= k; i += 32) {
      const __m512i both = _mm512_loadu_si512(x + i);
      const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
      const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(both, upper));
      const __m512i low = _mm512_castps_si512(_mm512_add_ps(_mm512_mul_ps(even, factor), magic));
      const __m512i high = _mm512_castps_si512(_mm512_add_ps(_mm512_mul_ps(odd, factor), magic));
      const __m512i pair = _mm512_ternarylogic_epi32(byte, low, _mm512_slli_epi32(high, 8), 0xca);  // byte ? low : high
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), _mm512_cvtepi32_epi16(pair));
    }
  }
#endif
  for (; i < k; ++i) codes[i] = int8_t(to_bits(T::load(x[i]) * inverse + 12582912.0f) & 0xff);
}

inline int32_t sum_codes(const int8_t* codes, int64_t count) {
  int32_t sum = 0;
  int64_t i = 0;
#if defined(__AVX512VNNI__)
  __m512i sums = _mm512_setzero_si512();
  for (; i + 64 <= count; i += 64)
    sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), _mm512_loadu_si512(codes + i));
  if (i) sum = _mm512_reduce_add_epi32(sums);
#endif
  for (; i < count; ++i) sum += codes[i];
  return sum;
}

// scale = absmax / 127, code = rint(x * (127 / absmax)), both in fp32. |x| compares like its bits without the sign.
template <class T>
void quantize_row(const Job& job, int64_t row) {
  using Storage = typename T::Storage;
  const Storage* x = reinterpret_cast<const Storage*>(job.x) + row * job.x_stride;
  if (job.gated) {
    thread_local std::vector<Storage> activation;
    if (int64_t(activation.size()) < job.k) activation.resize(size_t(job.k));
    gate_row<T>(x, x + job.k, job.k, activation.data());
    x = activation.data();
  }
  int8_t* __restrict codes = job.codes + row * job.code_stride;  // bytes alias anything: without this, no vectors
  int32_t* __restrict starts = job.starts + row * job.groups * 2;
  const int64_t k = job.k, padded = job.steps * 4, group = job.group_steps * 4;
  Storage largest = 0;
  for (int64_t i = 0; i < k; ++i) largest = std::max<Storage>(largest, Storage(x[i] & T::MAGNITUDE));
  const float absmax = T::load(largest);
  const bool finite = largest < T::INFINITE;
  if (!finite || absmax < 0x1p-100f) {  // below 2**-100 the row counts as zero: 127 / absmax must stay finite
    job.token_scales[row] = finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    std::memset(codes, 0, size_t(padded));
    std::memset(starts, 0, size_t(job.groups) * 2 * sizeof(int32_t));
    job.wholes[row] = 0;
    return;
  }
  job.token_scales[row] = absmax / 127.0f;
  const float inverse = 127.0f / absmax;
  encode<T>(x, k, inverse, codes);
  for (int64_t i = k; i < padded; ++i) codes[i] = 0;
  uint32_t whole = 0;  // wraps where groups are scaled one by one and nobody asks for it
  for (int64_t g = 0; g < job.groups; ++g) {
    const int32_t sum = sum_codes(codes + g * group, std::min(group, k - g * group));
    starts[2 * g] = -8 * sum, starts[2 * g + 1] = int32_t(-136u * uint32_t(sum));  // may wrap, see avx512.cpp
    whole += -128u * uint32_t(sum);
  }
  job.wholes[row] = int32_t(whole);
}

void quantize_rows(const Job& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (job.dtype == BFLOAT16) quantize_row<BFloat16>(job, row);
    else if (job.dtype == FLOAT16) quantize_row<Float16>(job, row);
    else quantize_row<Float32>(job, row);
  }
}

// Several rows' results go past Intel's caches: a store that misses them has its line brought first, and the weights on their
// way wait for that. (Fewer rows have few results.)
constexpr int64_t STREAMED_FROM = 7;

template <class T>
void store_row(const Job& job, int64_t row, int64_t channel, int64_t count, const float* sums, const float* bias) {
  typename T::Storage* y = reinterpret_cast<typename T::Storage*>(job.y) + row * job.n + channel;
  const float a = job.token_scales[row];
  alignas(64) typename T::Storage out[PANEL];
  if (bias) for (int i = 0; i < PANEL; ++i) out[i] = T::store(sums[i] * a + bias[i]);
  else for (int i = 0; i < PANEL; ++i) out[i] = T::store(sums[i] * a);
#if defined(__AVX512BW__)
  const bool lines = count == PANEL && reinterpret_cast<uintptr_t>(y) % 64 == 0;
  if (lines && job.m >= STREAMED_FROM && !past_l2()) {  // the driver fences
    __m512i* to = reinterpret_cast<__m512i*>(y);
    for (size_t i = 0; i < sizeof(out) / 64; ++i)
      _mm512_stream_si512(to + i, _mm512_load_si512(reinterpret_cast<const __m512i*>(out) + i));
    return;
  }
#endif
  std::memcpy(y, out, size_t(count) * sizeof(out[0]));
}

// One tile of rows times one panel, before the epilogue.
struct Tile {
  const uint8_t* weight;   // the panel
  const int8_t* codes;     // first row
  int64_t code_stride;
  const int32_t* starts;   // first row, [rows, groups, 2]
  const char* scales;      // [groups, 64]; multiples where groups are folded
  Dtype scale_dtype;
  const float* bases;      // [64], of folded groups
  int64_t steps, group_steps, groups;
  int64_t begin, end;      // groups to add now, where tiles pass blocks
  const char* prefetch;    // first byte to prefetch, and how far to move on at each step
  int64_t prefetch_stride;
  int32_t* totals;         // [rows, 64] sums over all inputs, of folded groups
  float* sums;             // out: [rows, 64] sums over the groups, scaled by the weights' scales
};

// The end of folded groups: sums = totals * bases. The reference adds to 0, which makes a product that underflowed +0.
inline void scale_totals(const Tile& tile, int rows) {
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < PANEL; ++i)
      tile.sums[r * PANEL + i] = 0.0f + float(tile.totals[r * PANEL + i]) * tile.bases[i];
}

inline void load_bias(const Job& job, int64_t channel, int64_t count, float* bias) {
  for (int64_t i = 0; i < count; ++i) {
    const char* b = job.bias + (channel + i) * (job.bias_dtype == FLOAT32 ? 4 : 2);
    uint32_t wide = 0;
    std::memcpy(&wide, b, job.bias_dtype == FLOAT32 ? 4 : 2);
    bias[i] = job.bias_dtype == FLOAT32 ? from_bits(wide)
              : job.bias_dtype == BFLOAT16 ? bfloat16_to_float(uint16_t(wide)) : half_to_float(uint16_t(wide));
  }
  for (int64_t i = count; i < PANEL; ++i) bias[i] = 0.0f;
}

// A panel's results on their way out: token scale, bias, rounding.
struct Epilogue {
  const Job& job;
  int64_t channel, count;  // the first one, and how many the panel has
  const float* bias;       // null without one

  Epilogue(const Job& job, int64_t panel, float* own)  // own: [64], for the bias
      : job(job), channel(panel * PANEL), count(std::min(PANEL, job.n - channel)), bias(job.bias ? own : nullptr) {
    if (bias) load_bias(job, channel, count, own);
  }

  void store(int64_t row, int64_t rows, const float* sums) const {
    for (int64_t end = row + rows; row < end; ++row, sums += PANEL) {
      if (job.dtype == BFLOAT16) store_row<BFloat16>(job, row, channel, count, sums, bias);
      else if (job.dtype == FLOAT16) store_row<Float16>(job, row, channel, count, sums, bias);
      else store_row<Float32>(job, row, channel, count, sums, bias);
    }
  }
};

// What all tiles of a panel have in common.
inline Tile panel_tile(const Job& job, int64_t panel) {
  Tile tile{};
  tile.weight = job.weight + panel * job.steps * STEP_BYTES;
  tile.code_stride = job.code_stride;
  tile.steps = job.steps, tile.group_steps = job.group_steps, tile.groups = job.groups;
  tile.scale_dtype = job.scale_dtype;
  if (job.scale_dtype == UINT8) {
    const char* own = job.scales + panel * (BASE_ROWS + job.groups) * PANEL;
    tile.bases = reinterpret_cast<const float*>(own), tile.scales = own + BASE_ROWS * PANEL;
  } else {
    tile.scales = job.scales + panel * job.groups * PANEL * (job.scale_dtype == BFLOAT16 ? 2 : 4);
  }
  return tile;
}

inline int rows_of_tile(int64_t rows, int64_t tiles, int64_t t) { return int(rows / tiles + (t < rows % tiles)); }

// Tile t of several brings its share of panel `next` into the cache.
inline void share_next(const Job& job, int64_t panel, int64_t next, int64_t t, int64_t tiles, Tile& tile) {
  const int64_t bytes = job.steps * STEP_BYTES;
  tile.prefetch_stride = next < 0 ? 0 : STEP_BYTES / tiles;
  tile.prefetch = reinterpret_cast<const char*>(job.weight) + (next < 0 ? panel : next) * bytes + t * (bytes / tiles);
}

// Rows [begin, end) in balanced tiles of at most `most` rows; `run(tile, rows)` computes one tile's sums.
// While a panel's tiles run, each brings its share of the next panel into the cache. A single tile instead runs `ahead` bytes
// ahead of itself, and so into the next panel, which follows in memory.
template <int most, class Run>
void multiply_rows(const Job& job, int64_t panel, int64_t begin, int64_t end, int64_t next, int64_t ahead, Run run) {
  const int64_t tiles = (end - begin + most - 1) / most;
  alignas(64) float sums[most * PANEL], bias[PANEL];
  alignas(64) int32_t totals[most * PANEL];
  const Epilogue epilogue(job, panel, bias);
  Tile tile = panel_tile(job, panel);
  tile.totals = totals, tile.sums = sums;
  for (int64_t t = 0, row = begin; t < tiles; ++t) {
    const int rows = rows_of_tile(end - begin, tiles, t);
    tile.codes = job.codes + row * job.code_stride;
    tile.starts = job.starts + row * job.groups * 2;
    if (tiles > 1) share_next(job, panel, next, t, tiles, tile);
    else tile.prefetch_stride = STEP_BYTES, tile.prefetch = reinterpret_cast<const char*>(tile.weight) + ahead;
    run(tile, rows);
    epilogue.store(row, rows, sums);
    row += rows;
  }
}

}  // namespace
