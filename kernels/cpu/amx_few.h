// The AMX path for few rows, whose limit is memory: nothing may keep the stream of weights waiting.
//
// Sums of up to 16 rows and the 64 channels of a panel stay in tile registers over all inputs, and a tile of inputs is
// multiplied while the next one is unpacked. (17 to 32 rows would have to pass the panel twice, the second time over what the
// first one unpacked; the many lines that then come from L2 keep those from memory waiting, and blocks are faster.)
//
// Registers: 0..3 sums of 16 channels each, 4 tokens, 6 and 7 weights.
#pragma once
#include "amx_tiles.h"

namespace {

constexpr int64_t FEW_FROM = 7, FEW_ROWS = TILE;  // below, the AVX512 path streams a panel in one pass, too
constexpr int64_t GROUPS_AHEAD = 4;               // whose multiples are fetched: a second stream from memory
constexpr int64_t PANEL_BYTES = 4 * TILE_BYTES;   // 64 inputs of a panel, unpacked: [channels / 16][16 steps][64]

// Rows of sums and of tokens that are there, so that products with the others take no time.
inline TileConfiguration few_rows(int64_t rows) {
  TileConfiguration made;
  for (int tile = 0; tile <= 4; ++tile) made.rows[tile] = uint8_t(rows);
  return made;
}

// One step of a panel: two words become a row of each of four operands. In assembly because it matters where the prefetches
// stand: lines are asked for one by one as they lie, each before its own word (evals/LOG.md, "a Xeon's weights in one pass").
#define FETCH(at) "prefetcht1 %c[far]+" at "(%[w])\n"

#define NIBBLES(at)                       \
  "vmovdqu64 " at "(%[w]), %[low]\n"      \
  "vpsrlw $4, %[low], %[high]\n"

#define MINUS_EIGHT                       \
  "vpandd %[mask], %[low], %[low]\n"      \
  "vpandd %[mask], %[high], %[high]\n"    \
  "vpsubb %[eight], %[low], %[low]\n"     \
  "vpsubb %[eight], %[high], %[high]\n"

// 0x6a: (first & second) ^ third
#define TIMES_MULTIPLES(low, high)                                  \
  "vpternlogd $0x6a, %[n" low "], %[mask], %[low]\n"                \
  "vpternlogd $0x6a, %[n" high "], %[mask], %[high]\n"              \
  "vpmullw %[t" low "], %[low], %[low]\n"                           \
  "vpmullw %[t" high "], %[high], %[high]\n"                        \
  "vpsubb %[m" low "], %[low], %[low]\n"                            \
  "vpsubb %[m" high "], %[high], %[high]\n"

#define KEEP_ROWS(low, high)              \
  "vmovdqa64 %[low], " low "(%[to])\n"    \
  "vmovdqa64 %[high], " high "(%[to])\n"

#define EACH_STEP(first, second)                                          \
  ".p2align 5\n"                                                          \
  "1:\n"                                                                  \
  FETCH("0") NIBBLES("0") first KEEP_ROWS("0", "1024")                    \
  FETCH("64") NIBBLES("64") second KEEP_ROWS("2048", "3072")              \
  "add $128, %[w]\n"                                                      \
  "add $64, %[to]\n"                                                      \
  "dec %[steps]\n"                                                        \
  "jnz 1b\n"

// `steps` steps of a panel, 1 to 16, from w on become rows of [4][16][64] from `to` on.
inline void unpack_steps(const uint8_t* w, int64_t steps, uint8_t* to) {
  __m512i low, high;
  asm volatile(EACH_STEP(MINUS_EIGHT, MINUS_EIGHT)
               : [w] "+r"(w), [to] "+r"(to), [steps] "+r"(steps), [low] "=&v"(low), [high] "=&v"(high)
               : [mask] "v"(_mm512_set1_epi8(15)), [eight] "v"(_mm512_set1_epi8(8)), [far] "i"(FAR_AHEAD)
               : "memory", "cc");
}

// The same of one folded group: codes times its multiples.
inline void unpack_steps(const uint8_t* w, int64_t steps, uint8_t* to, const Multiples& by) {
  __m512i low, high;
  asm volatile(EACH_STEP(TIMES_MULTIPLES("0", "1"), TIMES_MULTIPLES("2", "3"))
               : [w] "+r"(w), [to] "+r"(to), [steps] "+r"(steps), [low] "=&v"(low), [high] "=&v"(high)
               : [mask] "v"(_mm512_set1_epi8(15)), [far] "i"(FAR_AHEAD), [t0] "v"(by.times[0]), [t1] "v"(by.times[1]),
                 [t2] "v"(by.times[2]), [t3] "v"(by.times[3]), [m0] "v"(by.minus[0]), [m1] "v"(by.minus[1]),
                 [m2] "v"(by.minus[2]), [m3] "v"(by.minus[3]), [n0] "v"(by.turned[0]), [n1] "v"(by.turned[1]),
                 [n2] "v"(by.turned[2]), [n3] "v"(by.turned[3])
               : "memory", "cc");
}

// Inputs 64 t to 64 t + 63 of a panel become `to`, [4][16][64]; those that are not there become 0.
template <bool FOLDED>
inline void unpack_tile(const Tile& tile, int64_t t, uint8_t* to) {
  const int64_t first = t * DEPTH, last = std::min(first + DEPTH, tile.steps), some = last - first;
  if constexpr (FOLDED) {
    for (int64_t step = first, stop; step < last; step = stop) {
      const int64_t group = step / tile.group_steps;
      stop = std::min(last, (group + 1) * tile.group_steps);
      _mm_prefetch(tile.scales + (group + GROUPS_AHEAD) * PANEL, _MM_HINT_T0);
      unpack_steps(tile.weight + step * STEP_BYTES, stop - step, to + (step - first) * 64, Multiples(tile, group));
    }
  } else {
    unpack_steps(tile.weight + first * STEP_BYTES, some, to);
  }
  if (some < DEPTH)
    for (int i = 0; i < 4; ++i) std::memset(to + i * TILE_BYTES + some * 64, 0, size_t(DEPTH - some) * 64);
}

// Sums += 64 inputs of the rows times 64 channels.
inline void add_tile(const int8_t* codes, int64_t stride, const uint8_t* weights) {
  TILE_LOAD(4, codes, stride);
  TILE_LOAD(6, weights, 64);
  TILE_MULTIPLY_INT8(0, 4, 6);
  TILE_LOAD(7, weights + TILE_BYTES, 64);
  TILE_MULTIPLY_INT8(1, 4, 7);
  TILE_LOAD(6, weights + 2 * TILE_BYTES, 64);
  TILE_MULTIPLY_INT8(2, 4, 6);
  TILE_LOAD(7, weights + 3 * TILE_BYTES, 64);
  TILE_MULTIPLY_INT8(3, 4, 7);
}

// Totals of a panel over all inputs: [channels / 16][16][16].
template <bool FOLDED>
void sum_panel(const Tile& tile, int32_t* totals) {
  alignas(64) uint8_t bytes[2][PANEL_BYTES];
  const int64_t tiles = (tile.steps + DEPTH - 1) / DEPTH;
  clear_sums<2>();
  for (int64_t t = 0; t < tiles; ++t) {
    unpack_tile<FOLDED>(tile, t, bytes[t % 2]);
    if (t) add_tile(tile.codes + (t - 1) * 64, tile.code_stride, bytes[(t - 1) % 2]);
  }
  if (tiles) add_tile(tile.codes + (tiles - 1) * 64, tile.code_stride, bytes[(tiles - 1) % 2]);
  store_sums<2>(totals);
}

// Rows [begin, end), 16 at most, of layers whose sums run over all inputs.
template <bool FOLDED>
void multiply_few(const Job& job, int64_t panel, int64_t begin, int64_t end) {
  alignas(64) int32_t totals[4 * SUMS];
  alignas(64) float scaled[TILE * PANEL], bias[PANEL];
  const TileConfiguration configuration = few_rows(end - begin);
  const Epilogue epilogue(job, panel, bias);
  Tile tile = panel_tile(job, panel);
  tile.codes = job.codes + begin * job.code_stride;
  TILE_CONFIGURE(configuration);
  sum_panel<FOLDED>(tile, totals);
  TILE_RELEASE();
  gather_rows(reinterpret_cast<const char*>(totals), 2 * TILE_BYTES,
              FOLDED ? reinterpret_cast<const char*>(tile.bases) : tile.scales, FOLDED ? FLOAT32 : job.scale_dtype, true,
              end - begin, scaled);
  epilogue.store(begin, end - begin, scaled);
}

}  // namespace
