// The AVX512-VNNI path: up to 6 rows by 64 channels at a time, all integer sums in registers, floats in L1.
#include <immintrin.h>
#include "rows.h"
#include "scratch.h"
#include "stream.h"

namespace {

// The inner loop is assembly because gcc 12 keeps two copies of every sum alive and spills half of them to the stack,
// with intrinsics and with one-instruction asm alike. Registers: zmm0..zmm23 sums, four a row; zmm24..zmm27 the
// weights of one step, 16 channels each; zmm28 four activations, broadcast; zmm30 the nibble mask.
//
// Low nibbles are masked, high ones are not: sums 1 and 3 of a row are those of whole bytes, 16 * high + low, and a group's
// end takes the low ones (sums 0 and 2) away and shifts, two instructions a group of each row where masking was two a step. Sums of
// bytes may wrap; the difference does not: |16 * sum| < 2**31 up to k = 131072 (16 * 8 * 127 * k).
// vpdpbusd adds, in each 32-bit lane, four unsigned bytes (weights) times four signed ones (activations), exactly.
#define START(address, s0, s1, s2, s3)            \
  "vpbroadcastd 0" address ", %%zmm" #s0 "\n"     \
  "vpbroadcastd 4" address ", %%zmm" #s1 "\n"     \
  "vmovdqa64 %%zmm" #s0 ", %%zmm" #s2 "\n"        \
  "vmovdqa64 %%zmm" #s1 ", %%zmm" #s3 "\n"

#define LOAD_WEIGHTS                            \
  "vmovdqu64 128*.Lstep(%[w]), %%zmm25\n"       \
  "vmovdqu64 128*.Lstep+64(%[w]), %%zmm27\n"    \
  "vpandd %%zmm30, %%zmm25, %%zmm24\n"          \
  "vpandd %%zmm30, %%zmm27, %%zmm26\n"

#define DOT(address, s0, s1, s2, s3)              \
  "vpbroadcastd 4*.Lstep" address ", %%zmm28\n"   \
  "vpdpbusd %%zmm28, %%zmm24, %%zmm" #s0 "\n"     \
  "vpdpbusd %%zmm28, %%zmm25, %%zmm" #s1 "\n"     \
  "vpdpbusd %%zmm28, %%zmm26, %%zmm" #s2 "\n"     \
  "vpdpbusd %%zmm28, %%zmm27, %%zmm" #s3 "\n"

// A group's end, for one row: f[row, 64] += float(sum) * scale; one rounding for the product and one for the sum, as the
// reference has it.
#define FLOATS(at, s0, s1, s2, s3) \
  HIGH(s0, s1) HIGH(s2, s3) SCALE(s0, 24) SCALE(s1, 25) SCALE(s2, 26) SCALE(s3, 27) ADD("vaddps", at, s0, s1, s2, s3)

// The same of folded groups: f[row, 64] += sum * multiple, in int32.
#define INTEGERS(at, s0, s1, s2, s3) \
  HIGH(s0, s1) HIGH(s2, s3) TIMES(s0, 24) TIMES(s1, 25) TIMES(s2, 26) TIMES(s3, 27) ADD("vpaddd", at, s0, s1, s2, s3)

#define HIGH(low, both)                                           \
  "vpsubd %%zmm" #low ", %%zmm" #both ", %%zmm" #both "\n"        \
  "vpsrad $4, %%zmm" #both ", %%zmm" #both "\n"

#define SCALE(s, scale)                     \
  "vcvtdq2ps %%zmm" #s ", %%zmm" #s "\n"    \
  "vmulps %%zmm" #scale ", %%zmm" #s ", %%zmm" #s "\n"

#define TIMES(s, multiple) "vpmulld %%zmm" #multiple ", %%zmm" #s ", %%zmm" #s "\n"

#define ADD(add, at, s0, s1, s2, s3)                           \
  add " " at "+0(%[f]), %%zmm" #s0 ", %%zmm" #s0 "\n"          \
  add " " at "+64(%[f]), %%zmm" #s1 ", %%zmm" #s1 "\n"         \
  add " " at "+128(%[f]), %%zmm" #s2 ", %%zmm" #s2 "\n"        \
  add " " at "+192(%[f]), %%zmm" #s3 ", %%zmm" #s3 "\n" KEEP(at, s0, s1, s2, s3)

#define KEEP(at, s0, s1, s2, s3)                  \
  "vmovdqa64 %%zmm" #s0 ", " at "+0(%[f])\n"      \
  "vmovdqa64 %%zmm" #s1 ", " at "+64(%[f])\n"     \
  "vmovdqa64 %%zmm" #s2 ", " at "+128(%[f])\n"    \
  "vmovdqa64 %%zmm" #s3 ", " at "+192(%[f])\n"

#define FETCH(at, s0, s1, s2, s3)                 \
  "vmovdqa64 " at "+0(%[f]), %%zmm" #s0 "\n"      \
  "vmovdqa64 " at "+64(%[f]), %%zmm" #s1 "\n"     \
  "vmovdqa64 " at "+128(%[f]), %%zmm" #s2 "\n"    \
  "vmovdqa64 " at "+192(%[f]), %%zmm" #s3 "\n"

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

#define MULTIPLES                         \
  "vpmovsxbd (%[scales]), %%zmm24\n"      \
  "vpmovsxbd 16(%[scales]), %%zmm25\n"    \
  "vpmovsxbd 32(%[scales]), %%zmm26\n"    \
  "vpmovsxbd 48(%[scales]), %%zmm27\n"

// DO(offset in f, four sums) for each of the first rows.
#define EACH_1(DO) DO("0", 0, 1, 2, 3)
#define EACH_2(DO) EACH_1(DO) DO("256", 4, 5, 6, 7)
#define EACH_3(DO) EACH_2(DO) DO("512", 8, 9, 10, 11)
#define EACH_4(DO) EACH_3(DO) DO("768", 12, 13, 14, 15)
#define EACH_5(DO) EACH_4(DO) DO("1024", 16, 17, 18, 19)
#define EACH_6(DO) EACH_5(DO) DO("1280", 20, 21, 22, 23)
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

#define CLOBBERED                                                                                                      \
  "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",    \
      "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23",      \
      "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm30"

// A tile that is alone on its panel streams the weights from memory: two lines a step, which are used once. The tiles of a block
// share the work of bringing the next block there. Where there are no blocks, tiles share the next panel, into L2, and each
// brings its own weights from there into L1.
// Where the first two bring lines to is said in stream.h. A block that is only brought to L2 (HINT t1, not nta) keeps none of
// L1's few misses waiting.
#define STREAM_PAST_L2 "prefetchnta (%[ahead])\nprefetchnta 64(%[ahead])\n"
#define STREAM                                                  \
  "prefetcht1 (%[ahead])\nprefetcht1 64(%[ahead])\n"            \
  "prefetcht0 %c[near]+128*.Lstep(%[w])\n"                      \
  "prefetcht0 %c[near]+128*.Lstep+64(%[w])\n"
#define BLOCK(HINT) "prefetch" HINT " (%[ahead])\n"
#define SHARE "prefetcht1 (%[ahead])\nprefetcht0 1024+128*.Lstep(%[w])\nprefetcht0 1088+128*.Lstep(%[w])\n"

// `step` as often as %[steps] says, four at a time, which know their number as .Lstep: counting and advancing take issue slots
// and, of Intel's cores, ports of the dot products. A step of w has `bytes`.
#define STEPS(step, bytes)            \
  "sub $4, %[steps]\n"                \
  "jb 2f\n"                           \
  ".p2align 5\n"                      \
  "1:\n"                              \
  ".set .Lstep, 0\n"                  \
  ".rept 4\n" step                    \
  ".set .Lstep, .Lstep + 1\n"         \
  ".endr\n" ADVANCE(4, bytes)         \
  "sub $4, %[steps]\n"                \
  "jae 1b\n"                          \
  "2:\n"                              \
  "add $4, %[steps]\n"                \
  "jz 4f\n"                           \
  ".set .Lstep, 0\n"                  \
  "3:\n" step ADVANCE(1, bytes)       \
  "dec %[steps]\n"                    \
  "jnz 3b\n"                          \
  "4:\n"

#define ADVANCE(steps, bytes)           \
  "add $" #steps "*" #bytes ", %[w]\n"  \
  "add $" #steps "*4, %[a]\n"           \
  "add $" #steps "*4, %[a3]\n"

// One group of a tile; steps >= 1.
struct Group {
  const uint8_t* w;        // [steps, 128]
  const int8_t* a;         // codes of the first row, `stride` apart
  const char* ahead;       // to prefetch
  int64_t steps;
  const int32_t* starts;   // of the first row, `start_stride` bytes apart: what sums 0, 2 and sums 1, 3 start at
  const char* scales;      // [64], or multiples
  void* f;                 // float sums or int32 totals [rows, 64], aligned to 64 bytes
};

#define SUM_GROUP(rows, start, prefetch, scales_, finish)                                            \
  asm volatile("vpbroadcastd %[low], %%zmm30\n" start                                                \
               STEPS(LOAD_WEIGHTS prefetch DOT_##rows "add %[ahead_stride], %[ahead]\n", 128)        \
               scales_ EACH_##rows(finish)                                                           \
               : [w] "+r"(group.w), [a] "+r"(group.a), [a3] "+r"(a3), [ahead] "+r"(group.ahead),     \
                 [steps] "+r"(group.steps)                                                           \
               : [stride] "r"(stride), [ahead_stride] "r"(ahead_stride), [starts] "r"(group.starts), \
                 [starts3] "r"(starts3), [start_stride] "r"(start_stride), [f] "r"(group.f),         \
                 [scales] "r"(group.scales), [low] "m"(LOW_NIBBLES), [near] "i"(NEAR_AHEAD)          \
               : CLOBBERED)

#define FOR_EACH_ROWS(prefetch, scales_, finish)                             \
  if constexpr (ROWS == 1) SUM_GROUP(1, START_1, prefetch, scales_, finish); \
  if constexpr (ROWS == 2) SUM_GROUP(2, START_2, prefetch, scales_, finish); \
  if constexpr (ROWS == 3) SUM_GROUP(3, START_3, prefetch, scales_, finish); \
  if constexpr (ROWS == 4) SUM_GROUP(4, START_4, prefetch, scales_, finish); \
  if constexpr (ROWS == 5) SUM_GROUP(5, START_5, prefetch, scales_, finish); \
  if constexpr (ROWS == 6) SUM_GROUP(6, START_6, prefetch, scales_, finish)

const int32_t LOW_NIBBLES = 0x0f0f0f0f;

enum Order { ALONE, BLOCKS, PANELS };  // of tiles: one only; all of them over a block; all of them over a panel

#define FOR_EACH_SCALES(prefetch)                                                               \
  if constexpr (SCALES == FLOAT32) { FOR_EACH_ROWS(prefetch, FLOAT32_SCALES, FLOATS); }         \
  if constexpr (SCALES == BFLOAT16) { FOR_EACH_ROWS(prefetch, BFLOAT16_SCALES, FLOATS); }       \
  if constexpr (SCALES == UINT8) { FOR_EACH_ROWS(prefetch, MULTIPLES, INTEGERS); }

// SCALES: their type; UINT8 are the multiples of folded groups. PAST_L2: see stream.h; panels come from L2 anyhow.
template <int ROWS, Order ORDER, bool PAST_L2, Dtype SCALES>
inline void sum_group(Group group, int64_t stride, int64_t start_stride, int64_t ahead_stride) {
  const int8_t* a3 = group.a + 3 * stride;
  const char* starts3 = reinterpret_cast<const char*>(group.starts) + 3 * start_stride;
  if constexpr (ORDER == ALONE && PAST_L2) { FOR_EACH_SCALES(STREAM_PAST_L2) }
  if constexpr (ORDER == ALONE && !PAST_L2) { FOR_EACH_SCALES(STREAM) }
  if constexpr (ORDER == BLOCKS && PAST_L2) { FOR_EACH_SCALES(BLOCK("nta")) }
  if constexpr (ORDER == BLOCKS && !PAST_L2) { FOR_EACH_SCALES(BLOCK("t1")) }
  if constexpr (ORDER == PANELS) { FOR_EACH_SCALES(SHARE) }
}

// Scales are a second stream from memory: fetched so many groups ahead, and so into the next panel's.
constexpr int64_t SCALES_AHEAD = 4;

template <int ROWS, Order ORDER, bool PAST_L2, Dtype SCALES>
void run_tile(const Tile& tile) {
  constexpr int64_t BYTES = PANEL * (SCALES == FLOAT32 ? 4 : SCALES == BFLOAT16 ? 2 : 1);  // of a group's scales
  void* f = SCALES == UINT8 ? static_cast<void*>(tile.totals) : tile.sums;
  const int64_t begin = ORDER == BLOCKS ? tile.begin : 0, end = ORDER == BLOCKS ? tile.end : tile.groups;
  if (begin == 0) std::memset(f, 0, ROWS * PANEL * 4);
  if (ORDER == ALONE && SCALES == UINT8)
    for (int i = 0; i < PANEL; i += 16) _mm_prefetch(tile.bases + i, _MM_HINT_T0);
  for (int64_t g = begin, step = g * tile.group_steps; g < end; ++g, step += tile.group_steps) {
    if (ORDER == ALONE) {
      const bool past = SCALES == UINT8 && g + SCALES_AHEAD >= tile.groups;  // the next panel's bases come first
      const char* ahead = tile.scales + (g + SCALES_AHEAD + (past ? BASE_ROWS : 0)) * BYTES;
      for (int64_t line = 0; line < BYTES; line += 64) _mm_prefetch(ahead + line, PAST_L2 ? _MM_HINT_NTA : _MM_HINT_T0);
    }
    sum_group<ROWS, ORDER, PAST_L2, SCALES>(
        {tile.weight + step * STEP_BYTES, tile.codes + step * 4, tile.prefetch + step * tile.prefetch_stride,
         std::min(tile.group_steps, tile.steps - step), tile.starts + 2 * g, tile.scales + g * BYTES, f},
        tile.code_stride, tile.groups * 8, tile.prefetch_stride);
  }
  if (SCALES == UINT8 && end == tile.groups) scale_totals(tile, ROWS);
}

template <int ROWS, Order ORDER, Dtype SCALES>
void run_streamed(const Tile& tile) {
  if (ORDER != PANELS && past_l2()) run_tile<ROWS, ORDER, ORDER != PANELS, SCALES>(tile);
  else run_tile<ROWS, ORDER, false, SCALES>(tile);
}

template <Order ORDER, Dtype SCALES>
void run_rows(const Tile& tile, int rows) {
  switch (rows) {
    case 1: return run_streamed<1, ORDER, SCALES>(tile);
    case 2: return run_streamed<2, ORDER, SCALES>(tile);
    case 3: return run_streamed<3, ORDER, SCALES>(tile);
    case 4: return run_streamed<4, ORDER, SCALES>(tile);
    case 5: return run_streamed<5, ORDER, SCALES>(tile);
    default: return run_streamed<6, ORDER, SCALES>(tile);
  }
}

// Some rows: all tiles pass BLOCK_STEPS of a panel, which stay in L1 like the rows' codes, before the next ones, which
// follow in memory. A panel as a whole would come from L2 for every tile, and with long rows L2 would not hold the codes,
// this panel and the next. What a block adds up waits in memory, which many rows would have to fetch from L2.
constexpr int64_t BLOCK_STEPS = 64, MOST_ROWS = 36;

// The share of tile t in bringing what follows steps [first, last) of its panel.
inline void share_following(int64_t first, int64_t last, int64_t t, int64_t tiles, Tile& tile) {
  tile.prefetch_stride = STEP_BYTES / tiles;
  tile.prefetch = reinterpret_cast<const char*>(tile.weight) + last * STEP_BYTES +
                  t * ((last - first) * STEP_BYTES / tiles) - first * tile.prefetch_stride;
}

template <Dtype SCALES>
void multiply_blocks(const Job& job, int64_t panel, int64_t begin, int64_t end) {
  const int64_t rows = end - begin, tiles = (rows + 5) / 6;
  const int64_t groups = std::max<int64_t>(1, BLOCK_STEPS / job.group_steps);  // of a block
  alignas(64) float kept[MOST_ROWS * PANEL], sums[6 * PANEL], bias[PANEL];
  const Epilogue epilogue(job, panel, bias);
  Tile tile = panel_tile(job, panel);
  for (int64_t g = 0; g < job.groups; g += groups) {
    tile.begin = g, tile.end = std::min(job.groups, g + groups);
    for (int64_t t = 0, row = begin; t < tiles; ++t) {
      const int many = rows_of_tile(rows, tiles, t);
      float* own = kept + (row - begin) * PANEL;
      tile.totals = reinterpret_cast<int32_t*>(own), tile.sums = SCALES == UINT8 ? sums : own;
      tile.codes = job.codes + row * job.code_stride;
      tile.starts = job.starts + row * job.groups * 2;
      share_following(g * job.group_steps, std::min(job.steps, tile.end * job.group_steps), t, tiles, tile);
      run_rows<BLOCKS, SCALES>(tile, many);
      if (tile.end == job.groups) epilogue.store(row, many, tile.sums);
      row += many;
    }
  }
}

// Part of a group that is all inputs: f[rows, 64] += the products of its steps, as they are.
template <int ROWS, bool PAST_L2>
void sum_part(Group group, int64_t stride, int64_t ahead_stride) {
  const int64_t start_stride = 0;
  const char* starts3 = nullptr;
  const int8_t* a3 = group.a + 3 * stride;
#define FOR_EACH_PART(prefetch)                                                  \
  if constexpr (ROWS == 3) SUM_GROUP(3, EACH_3(FETCH), prefetch, "", KEEP);      \
  if constexpr (ROWS == 4) SUM_GROUP(4, EACH_4(FETCH), prefetch, "", KEEP);      \
  if constexpr (ROWS == 5) SUM_GROUP(5, EACH_5(FETCH), prefetch, "", KEEP);      \
  if constexpr (ROWS == 6) SUM_GROUP(6, EACH_6(FETCH), prefetch, "", KEEP);
  if constexpr (PAST_L2) { FOR_EACH_PART(BLOCK("nta")) }
  else { FOR_EACH_PART(BLOCK("t1")) }
}

constexpr decltype(&sum_part<6, true>) SUM_PART[2][4] = {
    {sum_part<3, false>, sum_part<4, false>, sum_part<5, false>, sum_part<6, false>},
    {sum_part<3, true>, sum_part<4, true>, sum_part<5, true>, sum_part<6, true>},
};

inline __m512 scales_at(const Tile& tile, int i) {
  if (tile.scale_dtype == FLOAT32) return _mm512_loadu_ps(reinterpret_cast<const float*>(tile.scales) + i);
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile.scales + 2 * i));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// The same for one scale a channel, where a panel is so large that L2 would not hold all that its tiles need. A block ends
// no group: its sums wait as they are. Where L2 does hold it, the whole panel is the block.
constexpr int64_t CHANNEL_STEPS = 512, LARGE_PANEL = 1536;  // steps

void multiply_channels(const Job& job, int64_t panel, int64_t begin, int64_t end) {
  const int64_t rows = end - begin, tiles = (rows + 5) / 6;  // tiles of 3 rows at least
  alignas(64) int32_t kept[MOST_ROWS * PANEL];
  alignas(64) float sums[6 * PANEL], bias[PANEL];
  const Epilogue epilogue(job, panel, bias);
  Tile tile = panel_tile(job, panel);
  for (int64_t r = 0; r < rows; ++r)
    for (int i = 0; i < 4; ++i)
      _mm512_store_si512(kept + r * PANEL + i * 16, _mm512_set1_epi32(job.starts[2 * (begin + r) + i % 2]));
  for (int64_t first = 0; first < job.steps; first += CHANNEL_STEPS) {
    const int64_t last = std::min(job.steps, first + CHANNEL_STEPS);
    for (int64_t t = 0, row = begin; t < tiles; ++t) {
      const int many = rows_of_tile(rows, tiles, t);
      int32_t* own = kept + (row - begin) * PANEL;
      share_following(first, last, t, tiles, tile);
      const Group part{tile.weight + first * STEP_BYTES, job.codes + row * job.code_stride + first * 4,
                       tile.prefetch + first * tile.prefetch_stride, last - first, nullptr, nullptr, own};
      SUM_PART[past_l2()][many - 3](part, job.code_stride, tile.prefetch_stride);
      if (last == job.steps) {
        for (int i = 0; i < many * PANEL; i += 16) {
          __m512i sum = _mm512_load_si512(own + i);
          if (i & 16) sum = _mm512_srai_epi32(_mm512_sub_epi32(sum, _mm512_load_si512(own + i - 16)), 4);
          const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scales_at(tile, i % PANEL));
          _mm512_store_ps(sums + i, _mm512_add_ps(_mm512_setzero_ps(), scaled));  // as in scale_totals
        }
        epilogue.store(row, many, sums);
      }
      row += many;
    }
  }
}

template <Dtype SCALES>
void multiply_groups(const Job& job, int64_t panel, int64_t begin, int64_t end, int64_t next) {
  const int64_t ahead = past_l2() ? stream_ahead() : FAR_AHEAD;  // of a tile that is alone
  if (end - begin <= 6) multiply_rows<6>(job, panel, begin, end, next, ahead, run_rows<ALONE, SCALES>);
  else if (end - begin > MOST_ROWS) multiply_rows<6>(job, panel, begin, end, next, ahead, run_rows<PANELS, SCALES>);
  else if (SCALES != UINT8 && job.groups == 1 && job.steps > LARGE_PANEL) multiply_channels(job, panel, begin, end);
  else multiply_blocks<SCALES>(job, panel, begin, end);
}

// Many rows of a folded layer, or of one with a scale a channel, whose multiples are 1. A panel becomes bytes once: 128 + code *
// multiple, 0..248, the unsigned operand of the dot products; rows start at -128 * sum(codes). No tile then masks a nibble or ends
// a group. The first tile unpacks as it multiplies, at most UNPACK_STEPS at a time, which stay in L2 for the other tiles; their
// totals wait in memory meanwhile.
//
// It costs the first tile some 8 cycles a step beside the 12 of its dot products, and spares every tile more than a tenth
// of that, so it pays from about 32 rows on. |total| < 2**31 up to k = 131072 (128 * 127 * k).
constexpr int64_t UNPACK_STEPS = 512, UNPACK_FROM = 32;
constexpr int64_t UNPACKED_BYTES = 256;  // of a step
static_assert(UNPACK_FROM >= 26, "from 26 rows on, tiles have 5 or 6 rows and the first one 6");

// A 16-bit lane holds two nibbles, code + 8 each. Times a multiple, plus twice 128 - 8 multiples, it is modulo 2**16 the two bytes
// that are wanted, whose range lets neither lend to the other: multiples may be negative.
#define UNPACK                            \
  "vmovdqu64 (%[packed]), %%zmm24\n"      \
  "vmovdqu64 64(%[packed]), %%zmm26\n"    \
  "add $128, %[packed]\n"                 \
  "vpsrlw $4, %%zmm24, %%zmm25\n"         \
  "vpsrlw $4, %%zmm26, %%zmm27\n"         \
  UNPACK_16(24, "0", "256") UNPACK_16(25, "64", "320") UNPACK_16(26, "128", "384") UNPACK_16(27, "192", "448")

#define UNPACK_16(w, at, offset)                               \
  "vpandd %%zmm30, %%zmm" #w ", %%zmm" #w "\n"                 \
  "vpmullw " at "(%[table]), %%zmm" #w ", %%zmm" #w "\n"       \
  "vpaddw " offset "(%[table]), %%zmm" #w ", %%zmm" #w "\n"    \
  "vmovdqa64 %%zmm" #w ", 256*.Lstep+" at "(%[w])\n"

#define LOAD_BYTES                               \
  "vmovdqa64 256*.Lstep(%[w]), %%zmm24\n"       \
  "vmovdqa64 256*.Lstep+64(%[w]), %%zmm25\n"     \
  "vmovdqa64 256*.Lstep+128(%[w]), %%zmm26\n"    \
  "vmovdqa64 256*.Lstep+192(%[w]), %%zmm27\n"

#define SUM_BYTES(rows, weights)                                                                  \
  asm volatile("vpbroadcastd %[low], %%zmm30\n" EACH_##rows(FETCH)                                \
               STEPS(weights "prefetcht1 (%[ahead])\n" DOT_##rows                                 \
                     "add %[ahead_stride], %[ahead]\n", 256)                                      \
               EACH_##rows(KEEP)                                                                  \
               : [w] "+r"(w), [a] "+r"(part.a), [a3] "+r"(a3), [ahead] "+r"(part.ahead),          \
                 [steps] "+r"(part.steps), [packed] "+r"(part.w)                                  \
               : [stride] "r"(stride), [ahead_stride] "r"(ahead_stride), [f] "r"(part.f),         \
                 [table] "r"(part.scales), [low] "m"(LOW_NIBBLES)                                 \
               : CLOBBERED)

// One tile times `part.steps` steps whose bytes are (or, for the FIRST tile of 6 rows, become) w; part.scales is the table
// that unpacks part.w: multiples in 16-bit lanes, and twice 128 - 8 * multiple in each, [2, 4, 64].
template <bool FIRST>
void sum_bytes(Group part, uint8_t* w, int rows, int64_t stride, int64_t ahead_stride) {
  const int8_t* a3 = part.a + 3 * stride;
  if constexpr (FIRST) SUM_BYTES(6, UNPACK);
  else if (rows == 5) SUM_BYTES(5, LOAD_BYTES);
  else SUM_BYTES(6, LOAD_BYTES);
}

void make_table(const char* multiples, char* table) {
  for (int i = 0; i < 4; ++i) {
    const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(multiples + i * 16));
    const __m512i m = _mm512_cvtepi8_epi32(sixteen);
    const __m512i rest = _mm512_sub_epi32(_mm512_set1_epi32(128), _mm512_slli_epi32(m, 3));  // 0..248
    _mm512_store_si512(table + i * 64, _mm512_mask_blend_epi16(0x55555555, _mm512_slli_epi32(m, 16), m));
    _mm512_store_si512(table + 256 + i * 64, _mm512_mullo_epi32(rest, _mm512_set1_epi32(0x01010101)));
  }
}

thread_local Scratch unpacked;

// False: no memory.
bool multiply_unpacked(const Job& job, int64_t panel, int64_t begin, int64_t end) {
  const int64_t blocks = (job.steps + UNPACK_STEPS - 1) / UNPACK_STEPS, block = (job.steps + blocks - 1) / blocks;
  const int64_t rows = end - begin, tiles = (rows + 5) / 6;
  char* memory = unpacked.take(size_t(block * UNPACKED_BYTES + rows * PANEL * 4));
  if (!memory) return false;
  uint8_t* bytes = reinterpret_cast<uint8_t*>(memory);
  int32_t* totals = reinterpret_cast<int32_t*>(memory + block * UNPACKED_BYTES);  // [rows, 64]
  for (int64_t r = 0; r < rows; ++r) std::fill_n(totals + r * PANEL, PANEL, job.wholes[begin + r]);
  alignas(64) float sums[6 * PANEL], bias[PANEL];
  alignas(64) char table[8 * 64], ones[PANEL];
  const Epilogue epilogue(job, panel, bias);
  Tile tile = panel_tile(job, panel);
  tile.sums = sums;
  alignas(64) float scales[PANEL];
  const bool folded = job.scale_dtype == UINT8;
  if (!folded) {
    std::memset(ones, 1, sizeof(ones));
    for (int i = 0; i < PANEL; i += 16) _mm512_store_ps(scales + i, scales_at(tile, i));
    tile.bases = scales;
  }
  for (int64_t first = 0; first < job.steps; first += block) {
    const int64_t last = std::min(job.steps, first + block);
    for (int64_t t = 0, row = begin; t < tiles; ++t) {
      const int many = rows_of_tile(rows, tiles, t);
      tile.totals = totals + (row - begin) * PANEL;
      share_following(first, last, t, tiles, tile);
      const int8_t* codes = job.codes + row * job.code_stride;
      for (int64_t step = first, stop; step < last; step = stop) {
        const int64_t g = step / job.group_steps;
        stop = t ? last : std::min(last, (g + 1) * job.group_steps);
        const Group part{tile.weight + step * STEP_BYTES, codes + step * 4, tile.prefetch + step * tile.prefetch_stride,
                         stop - step, nullptr, table, tile.totals};
        uint8_t* w = bytes + (step - first) * UNPACKED_BYTES;
        if (t == 0) make_table(folded ? tile.scales + g * PANEL : ones, table);
        if (t == 0) sum_bytes<true>(part, w, many, job.code_stride, tile.prefetch_stride);
        else sum_bytes<false>(part, w, many, job.code_stride, tile.prefetch_stride);
      }
      if (last == job.steps) {
        scale_totals(tile, many);
        epilogue.store(row, many, sums);
      }
      row += many;
    }
  }
  return true;
}

void multiply(const Job& job, int64_t panel, int64_t, int64_t begin, int64_t end, int64_t next) {
  // On Intel's cores masks take the ports of dot products, so that one scale a channel gains, too; AMD's have others for them.
  const bool folded = job.scale_dtype == UINT8, whole = folded || (job.groups == 1 && !past_l2());
  if (whole && end - begin >= UNPACK_FROM && multiply_unpacked(job, panel, begin, end)) return;
  if (folded) multiply_groups<UINT8>(job, panel, begin, end, next);
  else if (job.scale_dtype == BFLOAT16) multiply_groups<BFLOAT16>(job, panel, begin, end, next);
  else multiply_groups<FLOAT32>(job, panel, begin, end, next);
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

const Path AVX512_PATH{"avx512", quantize_rows, multiply, peak, BLOCK_ROWS, 12, 1};
