// The AVX512-VNNI path: up to 6 rows by 64 channels at a time, all integer sums in registers, floats in L1.
#include <immintrin.h>
#include "rows.h"

namespace {

// The inner loop is assembly because gcc 12 keeps two copies of every sum alive and spills half of them to the stack,
// with intrinsics and with one-instruction asm alike. Registers: zmm0..zmm23 sums, four a row; zmm24..zmm27 the
// weights of one step, 16 channels each; zmm28 four activations, broadcast; zmm30 and zmm31 the nibble masks.
//
// The high nibbles stay where they are (mask 0xf0), so sums 1 and 3 of a row come out 16 times too large, which
// costs one shift a group instead of one a step. |16 * sum| < 2**31 up to k = 131072 (16 * 8 * 127 * k).
// vpdpbusd adds, in each 32-bit lane, four unsigned bytes (weights) times four signed ones (activations), exactly.
#define START(offset, s0, s1, s2, s3)                    \
  "vpbroadcastd " offset "(%[offsets]), %%zmm" #s0 "\n"  \
  "vpslld $4, %%zmm" #s0 ", %%zmm" #s1 "\n"              \
  "vmovdqa64 %%zmm" #s0 ", %%zmm" #s2 "\n"               \
  "vmovdqa64 %%zmm" #s1 ", %%zmm" #s3 "\n"

#define LOAD_WEIGHTS                            \
  "vmovdqu64 (%[w]), %%zmm24\n"                 \
  "vmovdqu64 64(%[w]), %%zmm26\n"               \
  "vpandd %%zmm31, %%zmm24, %%zmm25\n"          \
  "vpandd %%zmm30, %%zmm24, %%zmm24\n"          \
  "vpandd %%zmm31, %%zmm26, %%zmm27\n"          \
  "vpandd %%zmm30, %%zmm26, %%zmm26\n"

#define DOT(address, s0, s1, s2, s3)              \
  "vpbroadcastd " address ", %%zmm28\n"           \
  "vpdpbusd %%zmm28, %%zmm24, %%zmm" #s0 "\n"     \
  "vpdpbusd %%zmm28, %%zmm25, %%zmm" #s1 "\n"     \
  "vpdpbusd %%zmm28, %%zmm26, %%zmm" #s2 "\n"     \
  "vpdpbusd %%zmm28, %%zmm27, %%zmm" #s3 "\n"

#define STORE(at, s0, s1, s2, s3)                 \
  "vmovdqa64 %%zmm" #s0 ", " at "+0(%[out])\n"    \
  "vmovdqa64 %%zmm" #s1 ", " at "+64(%[out])\n"   \
  "vmovdqa64 %%zmm" #s2 ", " at "+128(%[out])\n"  \
  "vmovdqa64 %%zmm" #s3 ", " at "+192(%[out])\n"

#define START_1 START("0", 0, 1, 2, 3)
#define START_2 START_1 START("4", 4, 5, 6, 7)
#define START_3 START_2 START("8", 8, 9, 10, 11)
#define START_4 START_3 START("12", 12, 13, 14, 15)
#define START_5 START_4 START("16", 16, 17, 18, 19)
#define START_6 START_5 START("20", 20, 21, 22, 23)
#define DOT_1 DOT("(%[a])", 0, 1, 2, 3)
#define DOT_2 DOT_1 DOT("(%[a],%[stride])", 4, 5, 6, 7)
#define DOT_3 DOT_2 DOT("(%[a],%[stride],2)", 8, 9, 10, 11)
#define DOT_4 DOT_3 DOT("(%[a3])", 12, 13, 14, 15)
#define DOT_5 DOT_4 DOT("(%[a3],%[stride])", 16, 17, 18, 19)
#define DOT_6 DOT_5 DOT("(%[a3],%[stride],2)", 20, 21, 22, 23)
#define STORE_1 STORE("0", 0, 1, 2, 3)
#define STORE_2 STORE_1 STORE("256", 4, 5, 6, 7)
#define STORE_3 STORE_2 STORE("512", 8, 9, 10, 11)
#define STORE_4 STORE_3 STORE("768", 12, 13, 14, 15)
#define STORE_5 STORE_4 STORE("1024", 16, 17, 18, 19)
#define STORE_6 STORE_5 STORE("1280", 20, 21, 22, 23)

// out: int32 [rows, 64], sums 1 and 3 of each row 16 times too large; steps >= 1.
#define SUM_GROUP(rows, prefetch)                                                                                   \
  asm volatile("vpbroadcastd %[low], %%zmm30\n"                                                                     \
               "vpslld $4, %%zmm30, %%zmm31\n" START_##rows                                                         \
               ".p2align 5\n"                                                                                       \
               "1:\n" LOAD_WEIGHTS prefetch DOT_##rows                                                              \
               "add $128, %[w]\n"                                                                                   \
               "add $4, %[a]\n"                                                                                     \
               "add $4, %[a3]\n"                                                                                    \
               "add %[ahead_stride], %[ahead]\n"                                                                    \
               "dec %[steps]\n"                                                                                     \
               "jnz 1b\n" STORE_##rows                                                                              \
               : [w] "+r"(w), [a] "+r"(a), [a3] "+r"(a3), [ahead] "+r"(ahead), [steps] "+r"(steps)                  \
               : [stride] "r"(stride), [ahead_stride] "r"(ahead_stride), [offsets] "r"(offsets), [out] "r"(out),    \
                 [low] "r"(0x0f0f0f0f)                                                                              \
               : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",    \
                 "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", \
                 "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm30", "xmm31")

// A tile that is alone on its panel streams the weights from memory: two lines a step, into L1. Otherwise the tiles
// of a panel share the work of bringing the next one into L2.
#define STREAM "prefetcht0 (%[ahead])\nprefetcht0 64(%[ahead])\n"
#define SHARE "prefetcht1 (%[ahead])\n"

template <int ROWS, bool ALONE>
inline void sum_group(const uint8_t* w, const int8_t* a, int64_t stride, int64_t steps, const int32_t* offsets,
                      const char* ahead, int64_t ahead_stride, int32_t* out) {
  const int8_t* a3 = a + 3 * stride;
  if constexpr (ROWS == 1 && ALONE) SUM_GROUP(1, STREAM);
  if constexpr (ROWS == 2 && ALONE) SUM_GROUP(2, STREAM);
  if constexpr (ROWS == 3 && ALONE) SUM_GROUP(3, STREAM);
  if constexpr (ROWS == 4 && ALONE) SUM_GROUP(4, STREAM);
  if constexpr (ROWS == 5 && ALONE) SUM_GROUP(5, STREAM);
  if constexpr (ROWS == 6 && ALONE) SUM_GROUP(6, STREAM);
  if constexpr (ROWS == 1 && !ALONE) SUM_GROUP(1, SHARE);
  if constexpr (ROWS == 2 && !ALONE) SUM_GROUP(2, SHARE);
  if constexpr (ROWS == 3 && !ALONE) SUM_GROUP(3, SHARE);
  if constexpr (ROWS == 4 && !ALONE) SUM_GROUP(4, SHARE);
  if constexpr (ROWS == 5 && !ALONE) SUM_GROUP(5, SHARE);
  if constexpr (ROWS == 6 && !ALONE) SUM_GROUP(6, SHARE);
}

inline __m512 load_scales(const Tile& tile, int64_t index) {
  if (!tile.scales_bfloat16) return _mm512_loadu_ps(reinterpret_cast<const float*>(tile.scales) + index);
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile.scales + index * 2));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

template <int ROWS, bool ALONE>
void run_tile(const Tile& tile) {
  alignas(64) int32_t total[ROWS * PANEL];
  int32_t offsets[ROWS];
  for (int64_t g = 0; g < tile.groups; ++g) {
    const int64_t step = g * tile.group_steps, steps = std::min(tile.group_steps, tile.steps - step);
    for (int r = 0; r < ROWS; ++r) offsets[r] = tile.offsets[r * tile.groups + g];
    sum_group<ROWS, ALONE>(tile.weight + step * STEP_BYTES, tile.codes + step * 4, tile.code_stride, steps, offsets,
                           tile.prefetch + step * tile.prefetch_stride, tile.prefetch_stride, total);
    for (int j = 0; j < 4; ++j) {
      const __m512 scale = load_scales(tile, g * PANEL + j * 16);
      for (int r = 0; r < ROWS; ++r) {
        __m512i sum = _mm512_load_si512(total + r * PANEL + j * 16);
        if (j & 1) sum = _mm512_srai_epi32(sum, 4);
        float* f = tile.sums + r * PANEL + j * 16;
        const __m512 before = g ? _mm512_load_ps(f) : _mm512_setzero_ps();
        _mm512_store_ps(f, _mm512_add_ps(before, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale)));
      }
    }
  }
  if (tile.groups == 0) std::fill(tile.sums, tile.sums + ROWS * PANEL, 0.0f);
}

template <bool ALONE>
void run_rows(const Tile& tile, int rows) {
  switch (rows) {
    case 1: return run_tile<1, ALONE>(tile);
    case 2: return run_tile<2, ALONE>(tile);
    case 3: return run_tile<3, ALONE>(tile);
    case 4: return run_tile<4, ALONE>(tile);
    case 5: return run_tile<5, ALONE>(tile);
    default: return run_tile<6, ALONE>(tile);
  }
}

void multiply(const Job& job, int64_t panel, int64_t begin, int64_t end, int64_t next) {
  if (end - begin <= 6) multiply_rows<6>(job, panel, begin, end, next, run_rows<true>);
  else multiply_rows<6>(job, panel, begin, end, next, run_rows<false>);
}

}  // namespace

const Path AVX512_PATH{"avx512", quantize_rows, multiply};
