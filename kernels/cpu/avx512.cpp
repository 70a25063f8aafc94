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
#define START(address, s0, s1, s2, s3)            \
  "vpbroadcastd 0" address ", %%zmm" #s0 "\n"     \
  "vpbroadcastd 4" address ", %%zmm" #s1 "\n"     \
  "vmovdqa64 %%zmm" #s0 ", %%zmm" #s2 "\n"        \
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

// f[row, 64] += float(sum) * scale; one rounding for the product and one for the sum, as the reference has it.
#define FINISH(at, s0, s1, s2, s3)                  \
  "vpsrad $4, %%zmm" #s1 ", %%zmm" #s1 "\n"         \
  "vpsrad $4, %%zmm" #s3 ", %%zmm" #s3 "\n"         \
  SCALE(s0, 24) SCALE(s1, 25) SCALE(s2, 26) SCALE(s3, 27) ADD(at, s0, s1, s2, s3)

#define SCALE(s, scale)                     \
  "vcvtdq2ps %%zmm" #s ", %%zmm" #s "\n"    \
  "vmulps %%zmm" #scale ", %%zmm" #s ", %%zmm" #s "\n"

#define ADD(at, s0, s1, s2, s3)                                \
  "vaddps " at "+0(%[f]), %%zmm" #s0 ", %%zmm" #s0 "\n"        \
  "vaddps " at "+64(%[f]), %%zmm" #s1 ", %%zmm" #s1 "\n"       \
  "vaddps " at "+128(%[f]), %%zmm" #s2 ", %%zmm" #s2 "\n"      \
  "vaddps " at "+192(%[f]), %%zmm" #s3 ", %%zmm" #s3 "\n"      \
  "vmovaps %%zmm" #s0 ", " at "+0(%[f])\n"                     \
  "vmovaps %%zmm" #s1 ", " at "+64(%[f])\n"                    \
  "vmovaps %%zmm" #s2 ", " at "+128(%[f])\n"                   \
  "vmovaps %%zmm" #s3 ", " at "+192(%[f])\n"

#define FLOAT32_SCALES                    \
  "vmovups (%[scales]), %%zmm24\n"        \
  "vmovups 64(%[scales]), %%zmm25\n"      \
  "vmovups 128(%[scales]), %%zmm26\n"     \
  "vmovups 192(%[scales]), %%zmm27\n"

#define BFLOAT16_SCALES                   \
  "vpmovzxwd (%[scales]), %%zmm24\n"      \
  "vpmovzxwd 32(%[scales]), %%zmm25\n"    \
  "vpmovzxwd 64(%[scales]), %%zmm26\n"    \
  "vpmovzxwd 96(%[scales]), %%zmm27\n"    \
  "vpslld $16, %%zmm24, %%zmm24\n"        \
  "vpslld $16, %%zmm25, %%zmm25\n"        \
  "vpslld $16, %%zmm26, %%zmm26\n"        \
  "vpslld $16, %%zmm27, %%zmm27\n"

#define FINISH_1 FINISH("0", 0, 1, 2, 3)
#define FINISH_2 FINISH_1 FINISH("256", 4, 5, 6, 7)
#define FINISH_3 FINISH_2 FINISH("512", 8, 9, 10, 11)
#define FINISH_4 FINISH_3 FINISH("768", 12, 13, 14, 15)
#define FINISH_5 FINISH_4 FINISH("1024", 16, 17, 18, 19)
#define FINISH_6 FINISH_5 FINISH("1280", 20, 21, 22, 23)
#define START_1 START("(%[starts])", 0, 1, 2, 3)
#define START_2 START_1 START("(%[starts],%[start_stride])", 4, 5, 6, 7)
#define START_3 START_2 START("(%[starts],%[start_stride],2)", 8, 9, 10, 11)
#define START_4 START_3 START("(%[starts3])", 12, 13, 14, 15)
#define START_5 START_4 START("(%[starts3],%[start_stride])", 16, 17, 18, 19)
#define START_6 START_5 START("(%[starts3],%[start_stride],2)", 20, 21, 22, 23)
#define DOT_1 DOT("(%[a])", 0, 1, 2, 3)
#define DOT_2 DOT_1 DOT("(%[a],%[stride])", 4, 5, 6, 7)
#define DOT_3 DOT_2 DOT("(%[a],%[stride],2)", 8, 9, 10, 11)
#define DOT_4 DOT_3 DOT("(%[a3])", 12, 13, 14, 15)
#define DOT_5 DOT_4 DOT("(%[a3],%[stride])", 16, 17, 18, 19)
#define DOT_6 DOT_5 DOT("(%[a3],%[stride],2)", 20, 21, 22, 23)

// A tile that is alone on its panel streams the weights from memory: two lines a step, into L1. Otherwise the tiles
// of a panel share the work of bringing the next one into L2, and each brings its own weights from there into L1.
#define STREAM "prefetcht0 (%[ahead])\nprefetcht0 64(%[ahead])\n"
#define SHARE "prefetcht1 (%[ahead])\nprefetcht0 1024(%[w])\nprefetcht0 1088(%[w])\n"

// One group of a tile; steps >= 1.
struct Group {
  const uint8_t* w;        // [steps, 128]
  const int8_t* a;         // codes of the first row, `stride` apart
  const char* ahead;       // to prefetch
  int64_t steps;
  const int32_t* starts;   // of the first row, `start_stride` bytes apart: what sums 0, 2 and sums 1, 3 start at
  const char* scales;      // [64]
  float* f;                // [rows, 64], aligned to 64 bytes
};

#define SUM_GROUP(rows, prefetch, scales_)                                                                          \
  asm volatile("vpbroadcastd %[low], %%zmm30\n"                                                                     \
               "vpslld $4, %%zmm30, %%zmm31\n" START_##rows                                                         \
               ".p2align 5\n"                                                                                       \
               "1:\n" LOAD_WEIGHTS prefetch DOT_##rows                                                              \
               "add $128, %[w]\n"                                                                                   \
               "add $4, %[a]\n"                                                                                     \
               "add $4, %[a3]\n"                                                                                    \
               "add %[ahead_stride], %[ahead]\n"                                                                    \
               "dec %[steps]\n"                                                                                     \
               "jnz 1b\n" scales_ FINISH_##rows                                                                     \
               : [w] "+r"(group.w), [a] "+r"(group.a), [a3] "+r"(a3), [ahead] "+r"(group.ahead),                    \
                 [steps] "+r"(group.steps)                                                                          \
               : [stride] "r"(stride), [ahead_stride] "r"(ahead_stride), [starts] "r"(group.starts),                \
                 [starts3] "r"(starts3), [start_stride] "r"(start_stride), [f] "r"(group.f),                        \
                 [scales] "r"(group.scales), [low] "m"(LOW_NIBBLES)                                                 \
               : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",    \
                 "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", \
                 "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm30", "xmm31")

#define FOR_EACH_ROWS(prefetch, scales_)                    \
  if constexpr (ROWS == 1) SUM_GROUP(1, prefetch, scales_); \
  if constexpr (ROWS == 2) SUM_GROUP(2, prefetch, scales_); \
  if constexpr (ROWS == 3) SUM_GROUP(3, prefetch, scales_); \
  if constexpr (ROWS == 4) SUM_GROUP(4, prefetch, scales_); \
  if constexpr (ROWS == 5) SUM_GROUP(5, prefetch, scales_); \
  if constexpr (ROWS == 6) SUM_GROUP(6, prefetch, scales_)

const int32_t LOW_NIBBLES = 0x0f0f0f0f;

// ALONE: the only tile of its panel. HALF: scales are bfloat16.
template <int ROWS, bool ALONE, bool HALF>
inline void sum_group(Group group, int64_t stride, int64_t start_stride, int64_t ahead_stride) {
  const int8_t* a3 = group.a + 3 * stride;
  const char* starts3 = reinterpret_cast<const char*>(group.starts) + 3 * start_stride;
  if constexpr (ALONE && HALF) { FOR_EACH_ROWS(STREAM, BFLOAT16_SCALES); }
  if constexpr (ALONE && !HALF) { FOR_EACH_ROWS(STREAM, FLOAT32_SCALES); }
  if constexpr (!ALONE && HALF) { FOR_EACH_ROWS(SHARE, BFLOAT16_SCALES); }
  if constexpr (!ALONE && !HALF) { FOR_EACH_ROWS(SHARE, FLOAT32_SCALES); }
}

template <int ROWS, bool ALONE, bool HALF>
void run_tile(const Tile& tile) {
  for (int i = 0; i < ROWS * 4; ++i) _mm512_store_ps(tile.sums + i * 16, _mm512_setzero_ps());
  constexpr int64_t SCALES = PANEL * (HALF ? 2 : 4);  // bytes of a group
  for (int64_t g = 0, step = 0; g < tile.groups; ++g, step += tile.group_steps) {
    if (ALONE)  // a second stream from memory, four groups ahead and so into the next panel's
      for (int64_t line = 0; line < SCALES; line += 64) _mm_prefetch(tile.scales + (g + 4) * SCALES + line, _MM_HINT_T0);
    sum_group<ROWS, ALONE, HALF>(
        {tile.weight + step * STEP_BYTES, tile.codes + step * 4, tile.prefetch + step * tile.prefetch_stride,
         std::min(tile.group_steps, tile.steps - step), tile.starts + 2 * g, tile.scales + g * SCALES, tile.sums},
        tile.code_stride, tile.groups * 8, tile.prefetch_stride);
  }
}

template <bool ALONE, bool HALF>
void run_rows(const Tile& tile, int rows) {
  switch (rows) {
    case 1: return run_tile<1, ALONE, HALF>(tile);
    case 2: return run_tile<2, ALONE, HALF>(tile);
    case 3: return run_tile<3, ALONE, HALF>(tile);
    case 4: return run_tile<4, ALONE, HALF>(tile);
    case 5: return run_tile<5, ALONE, HALF>(tile);
    default: return run_tile<6, ALONE, HALF>(tile);
  }
}

void multiply(const Job& job, int64_t panel, int64_t begin, int64_t end, int64_t next) {
  const bool alone = end - begin <= 6, half = job.scale_dtype == BFLOAT16;
  const auto run = alone ? (half ? run_rows<true, true> : run_rows<true, false>)
                         : (half ? run_rows<false, true> : run_rows<false, false>);
  multiply_rows<6>(job, panel, begin, end, next, run);
}

double peak(int64_t rounds) {
#define REGISTER_DOT(s) "vpdpbusd %%zmm30, %%zmm31, %%zmm" #s "\n"
#define REGISTER_ROW(s0, s1, s2, s3) REGISTER_DOT(s0) REGISTER_DOT(s1) REGISTER_DOT(s2) REGISTER_DOT(s3)
  int64_t left = rounds;
  asm volatile("vpxord %%zmm30, %%zmm30, %%zmm30\n"
               "vpxord %%zmm31, %%zmm31, %%zmm31\n"
               ".p2align 6\n"
               "1:\n" REGISTER_ROW(0, 1, 2, 3) REGISTER_ROW(4, 5, 6, 7) REGISTER_ROW(8, 9, 10, 11)
               REGISTER_ROW(12, 13, 14, 15) REGISTER_ROW(16, 17, 18, 19) REGISTER_ROW(20, 21, 22, 23)
               "dec %[left]\n"
               "jnz 1b\n"
               : [left] "+r"(left)
               :
               : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
                 "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22",
                 "xmm23", "xmm30", "xmm31");
  return double(rounds) * 24 * 128;
}

}  // namespace

const Path AVX512_PATH{"avx512", quantize_rows, multiply, peak};
