// bfloat16 layers with AVX512-BF16: up to 6 tokens by 64 channels at a time, all sums in registers.
#include <immintrin.h>
#include "bfloat16_expand.h"
#include "bfloat16_tile.h"

namespace {

// Assembly for the reason given in avx512.cpp. Registers: zmm0..zmm23 sums, four a token; zmm24..zmm27 the weights of
// one step; zmm28 two activations, broadcast. vdpbf16ps adds two products to each of 16 sums and takes denormals for zero.
#define DOT(address, s0, s1, s2, s3)              \
  "vpbroadcastd " address ", %%zmm28\n"           \
  "vdpbf16ps %%zmm28, %%zmm24, %%zmm" #s0 "\n"    \
  "vdpbf16ps %%zmm28, %%zmm25, %%zmm" #s1 "\n"    \
  "vdpbf16ps %%zmm28, %%zmm26, %%zmm" #s2 "\n"    \
  "vdpbf16ps %%zmm28, %%zmm27, %%zmm" #s3 "\n"

#define MOVE_TO(at, s0, s1, s2, s3)               \
  "vmovaps %%zmm" #s0 ", " at "+0(%[f])\n"        \
  "vmovaps %%zmm" #s1 ", " at "+64(%[f])\n"       \
  "vmovaps %%zmm" #s2 ", " at "+128(%[f])\n"      \
  "vmovaps %%zmm" #s3 ", " at "+192(%[f])\n"

#define MOVE_FROM(at, s0, s1, s2, s3)             \
  "vmovaps " at "+0(%[f]), %%zmm" #s0 "\n"        \
  "vmovaps " at "+64(%[f]), %%zmm" #s1 "\n"       \
  "vmovaps " at "+128(%[f]), %%zmm" #s2 "\n"      \
  "vmovaps " at "+192(%[f]), %%zmm" #s3 "\n"

// DO(offset in f, four sums) for each of the first tokens.
#define EACH_1(DO) DO("0", 0, 1, 2, 3)
#define EACH_2(DO) EACH_1(DO) DO("256", 4, 5, 6, 7)
#define EACH_3(DO) EACH_2(DO) DO("512", 8, 9, 10, 11)
#define EACH_4(DO) EACH_3(DO) DO("768", 12, 13, 14, 15)
#define EACH_5(DO) EACH_4(DO) DO("1024", 16, 17, 18, 19)
#define EACH_6(DO) EACH_5(DO) DO("1280", 20, 21, 22, 23)
#define DOT_1 DOT("(%[x])", 0, 1, 2, 3)
#define DOT_2 DOT_1 DOT("(%[x],%[stride])", 4, 5, 6, 7)
#define DOT_3 DOT_2 DOT("(%[x],%[stride],2)", 8, 9, 10, 11)
#define DOT_4 DOT_3 DOT("(%[x3])", 12, 13, 14, 15)
#define DOT_5 DOT_4 DOT("(%[x3],%[stride])", 16, 17, 18, 19)
#define DOT_6 DOT_5 DOT("(%[x3],%[stride],2)", 20, 21, 22, 23)

// Where they bring lines to is said in stream.h: HINT is nta or t0.
#define LINES_2(HINT) "prefetch" HINT " (%[ahead])\nprefetch" HINT " 64(%[ahead])\n"
#define LINES_3(HINT) LINES_2(HINT) "prefetch" HINT " 128(%[ahead])\n"
#define LINES_4(HINT) LINES_3(HINT) "prefetch" HINT " 192(%[ahead])\n"

#define PLAIN(w)                         \
  "vmovups (%[" #w "]), %%zmm24\n"       \
  "vmovups 64(%[" #w "]), %%zmm25\n"     \
  "vmovups 128(%[" #w "]), %%zmm26\n"    \
  "vmovups 192(%[" #w "]), %%zmm27\n"    \
  "add $256, %[" #w "]\n"

// Lower bytes from memory, upper ones from the table zmm29 by nibbles (mask zmm30), and both interleaved.
#define COMPRESSED                                   \
  "vmovups (%[w]), %%zmm24\n"                        \
  "vpandd 128(%[w]), %%zmm30, %%zmm31\n"             \
  "vpshufb %%zmm31, %%zmm29, %%zmm31\n"              \
  "vpunpckhbw %%zmm31, %%zmm24, %%zmm25\n"           \
  "vpunpcklbw %%zmm31, %%zmm24, %%zmm24\n"           \
  "vmovups 64(%[w]), %%zmm26\n"                      \
  "vpsrlw $4, 128(%[w]), %%zmm31\n"                  \
  "vpandd %%zmm31, %%zmm30, %%zmm31\n"               \
  "vpshufb %%zmm31, %%zmm29, %%zmm31\n"              \
  "vpunpckhbw %%zmm31, %%zmm26, %%zmm27\n"           \
  "vpunpcklbw %%zmm31, %%zmm26, %%zmm26\n"           \
  "add $192, %[w]\n"

#define CLOBBERED                                                                                     \
  "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",     \
      "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19",       \
      "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29",       \
      "xmm30", "xmm31"

#define NEXT_X                    \
  "add $4, %[x]\n"                \
  "add $4, %[x3]\n"               \
  "add %[ahead_stride], %[ahead]\n"

#define SUM(tokens, lines)                                                                            \
  asm volatile(EACH_##tokens(MOVE_FROM) ".p2align 5\n"                                                \
               "1:\n" PLAIN(w) lines DOT_##tokens NEXT_X                                              \
               "dec %[steps]\n"                                                                       \
               "jnz 1b\n" EACH_##tokens(MOVE_TO)                                                      \
               : [w] "+r"(w), [x] "+r"(x), [x3] "+r"(x3), [ahead] "+r"(ahead), [steps] "+r"(steps)    \
               : [stride] "r"(stride), [ahead_stride] "r"(part.ahead_stride), [f] "r"(part.sums)      \
               : CLOBBERED)

// Runs of compressed steps, and between each two a step that lies in the plain layout.
#define SUM_COMPRESSED(tokens, lines)                                                                 \
  asm volatile(EACH_##tokens(MOVE_FROM)                                                               \
               "vbroadcasti32x4 (%[table]), %%zmm29\n"                                                \
               "vpbroadcastd %[nibble], %%zmm30\n"                                                    \
               "jmp 3f\n"                                                                             \
               ".p2align 5\n"                                                                         \
               "1:\n" COMPRESSED lines DOT_##tokens NEXT_X                                            \
               "dec %[steps]\n"                                                                       \
               "jnz 1b\n"                                                                             \
               "2:\n"                                                                                 \
               "cmp %[run], %[last]\n"                                                                \
               "je 4f\n"                                                                              \
               "add $192, %[w]\n" PLAIN(plain) lines DOT_##tokens NEXT_X                              \
               "add $8, %[run]\n"                                                                     \
               "3:\n"                                                                                 \
               "mov (%[run]), %[steps]\n"                                                             \
               "test %[steps], %[steps]\n"                                                            \
               "jnz 1b\n"                                                                             \
               "jmp 2b\n"                                                                             \
               "4:\n" EACH_##tokens(MOVE_TO)                                                          \
               : [w] "+r"(w), [x] "+r"(x), [x3] "+r"(x3), [ahead] "+r"(ahead), [steps] "=&r"(steps),  \
                 [run] "+r"(run), [plain] "+r"(plain)                                                 \
               : [stride] "r"(stride), [ahead_stride] "r"(part.ahead_stride), [f] "r"(part.sums),     \
                 [last] "r"(block.runs + block.count), [table] "r"(block.table), [nibble] "m"(NIBBLE) \
               : CLOBBERED)

constexpr uint32_t NIBBLE = 0x0f0f0f0f;

// Compressed steps as runs[0], one step from `plain`, runs[1], ..., runs[count].
struct CompressedBlock {
  int64_t count, runs[bfloat16::BLOCK_STEPS + 1];
  const uint8_t* table;
  alignas(64) char plain[bfloat16::BLOCK_STEPS * STEP_BYTES];

  void prepare(const Compressed& own) {
    const Upper upper(own.table);
    int64_t done = 0;
    count = 0, table = own.table;
    for (const int64_t* value = own.rest; value < own.rest_end; ++count) {
      const int64_t step = own.step(value);
      char* to = plain + count * STEP_BYTES;
      for (int half = 0; half < 2; ++half) upper.restore(own.w + step * COMPRESSED_BYTES, half, to + half * STEP_BYTES / 2);
      for (; value < own.rest_end && own.step(value) == step; ++value) put(*value, to);
      runs[count] = step - done, done = step + 1;
    }
    runs[count] = own.steps - done;
  }
};

// part.steps >= 1.
template <int TOKENS, bool ALONE, bool PAST_L2>
void sum(const Job& job, const Part& part) {
  const int64_t stride = job.x_stride;
  const char *w = part.w, *x = part.x, *x3 = x + 3 * stride, *ahead = part.ahead;
  int64_t steps = part.steps;
#define FOR_TOKENS(tokens)                                                              \
  if constexpr (TOKENS == tokens && ALONE && PAST_L2) SUM(tokens, LINES_4("nta"));      \
  if constexpr (TOKENS == tokens && !ALONE && PAST_L2) SUM(tokens, LINES_2("nta"));     \
  if constexpr (TOKENS == tokens && ALONE && !PAST_L2) SUM(tokens, LINES_4("t0"));      \
  if constexpr (TOKENS == tokens && !ALONE && !PAST_L2) SUM(tokens, LINES_2("t0"));
  FOR_TOKENS(1) FOR_TOKENS(2) FOR_TOKENS(3) FOR_TOKENS(4) FOR_TOKENS(5) FOR_TOKENS(6)
#undef FOR_TOKENS
}

template <int TOKENS, bool ALONE, bool PAST_L2>
void sum_compressed(const Job& job, const Part& part, const CompressedBlock& block) {
  const int64_t stride = job.x_stride, *run = block.runs;
  const char *w = part.w, *x = part.x, *x3 = x + 3 * stride, *ahead = part.ahead, *plain = block.plain;
  int64_t steps;
#define FOR_TOKENS(tokens)                                                                         \
  if constexpr (TOKENS == tokens && ALONE && PAST_L2) SUM_COMPRESSED(tokens, LINES_3("nta"));      \
  if constexpr (TOKENS == tokens && !ALONE && PAST_L2) SUM_COMPRESSED(tokens, LINES_2("nta"));     \
  if constexpr (TOKENS == tokens && ALONE && !PAST_L2) SUM_COMPRESSED(tokens, LINES_3("t0"));      \
  if constexpr (TOKENS == tokens && !ALONE && !PAST_L2) SUM_COMPRESSED(tokens, LINES_2("t0"));
  FOR_TOKENS(1) FOR_TOKENS(2) FOR_TOKENS(3) FOR_TOKENS(4) FOR_TOKENS(5) FOR_TOKENS(6)
#undef FOR_TOKENS
}

#define EACH_COUNT(function, alone, past_l2)                                                                  \
  {function<1, alone, past_l2>, function<2, alone, past_l2>, function<3, alone, past_l2>,                     \
   function<4, alone, past_l2>, function<5, alone, past_l2>, function<6, alone, past_l2>}
#define EACH_WAY(function)                                                             \
  {{EACH_COUNT(function, false, false), EACH_COUNT(function, false, true)},            \
   {EACH_COUNT(function, true, false), EACH_COUNT(function, true, true)}}
constexpr decltype(&sum<1, true, true>) SUMS[2][2][6] = EACH_WAY(sum);  // alone, past L2, tokens - 1
constexpr decltype(&sum_compressed<1, true, true>) SUMS_COMPRESSED[2][2][6] = EACH_WAY(sum_compressed);

struct Own {
  static constexpr int MOST = 6;
  using Block = CompressedBlock;

  static void add(const Job& job, const Part& part) {
    SUMS[part.alone][past_l2()][part.tokens - 1](job, part);
  }

  static void add_compressed(const Job& job, const Part& part, const Block& block) {
    SUMS_COMPRESSED[part.alone][past_l2()][part.tokens - 1](job, part, block);
  }
};

}  // namespace

const bfloat16::Path bfloat16::AVX512_PATH{"avx512", 2, multiply_tiles<Own>};
