// bfloat16 layers with AVX512-BF16: up to 6 tokens by 64 channels at a time, all sums in registers.
#include <immintrin.h>
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

#define LINES_2 "prefetcht0 (%[ahead])\nprefetcht0 64(%[ahead])\n"
#define LINES_4 LINES_2 "prefetcht0 128(%[ahead])\nprefetcht0 192(%[ahead])\n"

#define SUM(tokens, lines)                                                                            \
  asm volatile(EACH_##tokens(MOVE_FROM) ".p2align 5\n"                                                \
               "1:\n"                                                                                 \
               "vmovups (%[w]), %%zmm24\n"                                                            \
               "vmovups 64(%[w]), %%zmm25\n"                                                          \
               "vmovups 128(%[w]), %%zmm26\n"                                                         \
               "vmovups 192(%[w]), %%zmm27\n" lines DOT_##tokens                                      \
               "add $256, %[w]\n"                                                                     \
               "add $4, %[x]\n"                                                                       \
               "add $4, %[x3]\n"                                                                      \
               "add %[ahead_stride], %[ahead]\n"                                                      \
               "dec %[steps]\n"                                                                       \
               "jnz 1b\n" EACH_##tokens(MOVE_TO)                                                      \
               : [w] "+r"(w), [x] "+r"(x), [x3] "+r"(x3), [ahead] "+r"(ahead), [steps] "+r"(steps)    \
               : [stride] "r"(stride), [ahead_stride] "r"(ahead_stride), [f] "r"(f)                   \
               : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",      \
                 "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16",       \
                 "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25",     \
                 "xmm26", "xmm27", "xmm28")

// steps >= 1; ALONE: the only tile of its panel.
template <int TOKENS, bool ALONE>
void sum(const char* w, const char* x, int64_t stride, int64_t steps, float* f, const char* ahead,
         int64_t ahead_stride) {
  const char* x3 = x + 3 * stride;
#define FOR_TOKENS(tokens)                                            \
  if constexpr (TOKENS == tokens && ALONE) SUM(tokens, LINES_4);      \
  if constexpr (TOKENS == tokens && !ALONE) SUM(tokens, LINES_2);
  FOR_TOKENS(1) FOR_TOKENS(2) FOR_TOKENS(3) FOR_TOKENS(4) FOR_TOKENS(5) FOR_TOKENS(6)
}

template <bool ALONE>
constexpr decltype(&sum<1, true>) SUMS[] = {sum<1, ALONE>, sum<2, ALONE>, sum<3, ALONE>,
                                            sum<4, ALONE>, sum<5, ALONE>, sum<6, ALONE>};

void multiply(const Job& job, int64_t panel, int64_t begin, int64_t end) {
  multiply_tiles<6>(job, panel, begin, end,
                    [&](int tokens, const char* w, const char* x, int64_t steps, float* sums, const char* ahead,
                        int64_t ahead_stride, bool alone) {
                      const auto& own = alone ? SUMS<true> : SUMS<false>;
                      own[tokens - 1](w, x, job.x_stride, steps, sums, ahead, ahead_stride);
                    });
}

}  // namespace

const bfloat16::Path bfloat16::AVX512_PATH{"avx512", 2, multiply};
