// The AMX path: 32 rows by 32 channels at a time in tile registers, for as many rows as make unpacking pay. 7 to 16
// rows have a loop of their own, see amx_few.h, and fewer run on the AVX512 path.
//
// A tile register holds 16 rows of 64 bytes. A row of operand A is 64 inputs of one token, as the codes lie; a row of
// operand B is 4 inputs of 16 channels, which is what a 64-byte word of a panel holds in its low, and again in its high
// nibbles. So 16 steps become two operands, [4 x 64 bytes of a step][16 steps], with no byte changing its place. Unpacked
// bytes are signed, hence no sum needs a start of its own.
//
// Registers: 0..3 sums (rows 0, channels 0; rows 0, channels 1; rows 1, ...), 4 and 5 tokens, 6 and 7 weights.
#include "amx_few.h"
#include "amx_tiles.h"
#include "scratch.h"

namespace {

// Tiles of inputs that are unpacked at a time. Many rows: as many as L1 holds of a panel, of 32 rows, and of their sums.
// Up to SOME_ROWS memory is the limit, and multiplying soon after unpacking leaves it no pause.
constexpr int64_t BLOCK_TILES = 6, SOME_TILES = 2, SOME_ROWS = 64;
constexpr int64_t ROWS_FROM = 16;     // fewer run in amx_few.h or on the AVX512 path

// What one thread works in: bytes of a block of weights, and sums of all rows.
thread_local Scratch scratch;

// Steps [first, first + count) of a panel become `tiles` x 64 inputs of bytes, [2 halves][tiles][2][1024]: channels 0..31 and
// 32..63, of each tile the two operands that are multiplied with the same inputs. Steps that are not there become 0.
// `low` and `high` make bytes of a word: the 16 channels of its low and of its high nibbles. `ahead`: what is prefetched, in
// bytes behind each word; 0 where that has been done.
template <class Low, class High>
inline void unpack(const uint8_t* weight, int64_t first, int64_t count, int64_t tiles, int64_t at, uint8_t* bytes,
                   int64_t ahead, Low low, High high) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t tile = (at + i) / DEPTH, row = (at + i) % DEPTH;
    for (int64_t half = 0; half < 2; ++half) {
      const uint8_t* from = weight + (first + i) * STEP_BYTES + half * 64;
      const __m512i word = _mm512_loadu_si512(from);
      if (ahead) _mm_prefetch(reinterpret_cast<const char*>(from) + ahead, _MM_HINT_T0);
      uint8_t* to = bytes + (half * tiles + tile) * 2 * TILE_BYTES + row * 64;
      _mm512_store_si512(to, low(word, half));
      _mm512_store_si512(to + TILE_BYTES, high(word, half));
    }
  }
}

void unpack_codes(const uint8_t* weight, int64_t first, int64_t count, int64_t tiles, uint8_t* bytes, int64_t ahead) {
  const __m512i mask = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
  unpack(
      weight, first, count, tiles, 0, bytes, ahead,
      [&](__m512i word, int64_t) { return _mm512_sub_epi8(_mm512_and_si512(word, mask), eight); },
      [&](__m512i word, int64_t) {
        return _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(word, 4), mask), eight);
      });
}

// Codes times their group's multiple.
void unpack_folded(const Tile& tile, int64_t first, int64_t count, int64_t tiles, uint8_t* bytes, int64_t ahead) {
  const __m512i mask = _mm512_set1_epi8(15);
  const auto times = [&](__m512i word, const Multiples& by, int64_t i) {
    const __m512i nibbles = _mm512_xor_si512(_mm512_and_si512(word, mask), by.turned[i]);  // one instruction
    return _mm512_sub_epi8(_mm512_mullo_epi16(nibbles, by.times[i]), by.minus[i]);
  };
  for (int64_t step = first, stop; step < first + count; step = stop) {
    const int64_t group = step / tile.group_steps;
    stop = std::min(first + count, (group + 1) * tile.group_steps);
    const Multiples by(tile, group);
    unpack(
        tile.weight, step, stop - step, tiles, step - first, bytes, ahead,
        [&](__m512i word, int64_t half) { return times(word, by, 2 * half); },
        [&](__m512i word, int64_t half) { return times(_mm512_srli_epi16(word, 4), by, 2 * half + 1); });
  }
}

// The last tile's steps that the weights do not have.
void clear_rest(int64_t count, int64_t tiles, uint8_t* bytes) {
  for (int64_t operand = 0; operand < 4; ++operand)
    for (int64_t row = count; row < tiles * DEPTH; ++row)
      std::memset(bytes + ((operand / 2 * tiles + row / DEPTH) * 2 + operand % 2) * TILE_BYTES + row % DEPTH * 64, 0, 64);
}

// Weights that the next block unpacks, brought into L2 while this one is multiplied: some lines with each tile.
struct Ahead {
  const char* at;
  int64_t lines;

  void fetch() {
    for (int64_t i = 0; i < lines; ++i, at += 64) _mm_prefetch(at, _MM_HINT_T1);
  }
};

template <int I>
struct At {
  static constexpr int VALUE = I;
};

// One tile of inputs: C += A B for 16 R rows and 32 channels; `between(i)` runs after product i.
template <int R, class Between>
inline __attribute__((always_inline)) void multiply_tile(const int8_t* a, int64_t stride, const uint8_t* b, Ahead& ahead,
                                                         Between between) {
  ahead.fetch();
  TILE_LOAD(6, b, 64);
  TILE_LOAD(4, a, stride);
  TILE_MULTIPLY_INT8(0, 4, 6);
  between(At<0>{});
  TILE_LOAD(7, b + TILE_BYTES, 64);
  TILE_MULTIPLY_INT8(1, 4, 7);
  between(At<1>{});
  if constexpr (R == 2) {
    TILE_LOAD(5, a + TILE * stride, stride);
    TILE_MULTIPLY_INT8(2, 5, 6);
    between(At<2>{});
    TILE_MULTIPLY_INT8(3, 5, 7);
    between(At<3>{});
  }
}

// What store_sums stored.
template <int R>
inline void load_sums(const int32_t* from) {
  TILE_LOAD(0, from, 64);
  TILE_LOAD(1, from + SUMS, 64);
  if constexpr (R == 2) {
    TILE_LOAD(2, from + 2 * SUMS, 64);
    TILE_LOAD(3, from + 3 * SUMS, 64);
  }
}

// A part of one sum over all inputs: totals [R][2][16][16] of one half of a panel.
template <int R>
void sum_whole(const int8_t* a, int64_t stride, const uint8_t* b, int64_t tiles, int32_t* totals, bool fresh,
               Ahead& ahead) {
  if (fresh) clear_sums<R>();
  else load_sums<R>(totals);
  for (int64_t t = 0; t < tiles; ++t, a += 64, b += 2 * TILE_BYTES) multiply_tile<R>(a, stride, b, ahead, [](auto) {});
  store_sums<R>(totals);
}

// The sums of a group that wait to be scaled and added to f, float [rows][2][16][16].
struct Waiting {
  float* f = nullptr;  // null: none do
  const char* scales;  // of their 32 channels
  int rows = 0;        // tiles of them, 1 or 2
  alignas(64) int32_t sums[2 * 2 * SUMS];
};

// f[row, 16] += sums[row, 16] * the scales of its 16 channels, for COUNT rows of [rows][2][16]; one rounding for the product and
// one for the sum, as the reference has it.
template <int FIRST, int COUNT>
inline __attribute__((always_inline)) void scale_rows(const int32_t* sums, __m512 s0, __m512 s1, float* f) {
#pragma GCC unroll 64
  for (int row = FIRST; row < FIRST + COUNT; ++row) {
    const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums + row * TILE));
    const __m512 product = _mm512_mul_ps(sum, row / TILE % 2 ? s1 : s0);
    _mm512_store_ps(f + row * TILE, _mm512_add_ps(_mm512_load_ps(f + row * TILE), product));
  }
}

void scale_waiting(Waiting& waiting, Dtype dtype) {
  if (!waiting.f) return;
  const __m512 s0 = scales_at(waiting.scales, dtype, 0), s1 = scales_at(waiting.scales, dtype, TILE);
  scale_rows<0, 2 * TILE>(waiting.sums, s0, s1, waiting.f);
  if (waiting.rows == 2) scale_rows<2 * TILE, 2 * TILE>(waiting.sums, s0, s1, waiting.f);
  waiting.f = nullptr;
}

// Several groups of 16 R rows and 32 channels. The sums of one are scaled while the next one's are multiplied, be they of the
// same rows or of the next: some rows after each product of a group's first tile (its first two, where it has more).
template <int R, bool SHORT>  // SHORT: groups of one tile
void sum_groups(const int8_t* a, int64_t stride, const uint8_t* b, int64_t tiles, int64_t group_tiles, const char* scales,
                Dtype dtype, float* f, Ahead& ahead, Waiting& waiting) {
  constexpr int ROWS = SHORT ? 16 : 8;
  const int64_t scale_stride = PANEL * (dtype == FLOAT32 ? 4 : 2);
  auto add_tile = [&](auto between) {
    multiply_tile<R>(a, stride, b, ahead, between);
    a += 64, b += 2 * TILE_BYTES;
  };
  for (int64_t first = 0; first < tiles; first += group_tiles, scales += scale_stride) {
    const int64_t count = std::min(tiles - first, group_tiles);
    if (waiting.rows != R || (!SHORT && count == 1)) scale_waiting(waiting, dtype);
    clear_sums<R>();
    int64_t t = 0;
    if (waiting.f) {
      const __m512 s0 = scales_at(waiting.scales, dtype, 0), s1 = scales_at(waiting.scales, dtype, TILE);
      const int32_t* sums = waiting.sums;
      float* to = waiting.f;
      add_tile([=](auto at) { scale_rows<at.VALUE * ROWS, ROWS>(sums, s0, s1, to); });
      if (!SHORT) add_tile([=](auto at) { scale_rows<R * TILE + at.VALUE * ROWS, ROWS>(sums, s0, s1, to); });
      t = SHORT ? 1 : 2;
    }
    for (; t < count; ++t) add_tile([](auto) {});
    store_sums<R>(waiting.sums);
    waiting.f = f, waiting.scales = scales, waiting.rows = R;
  }
}

// False: no memory.
bool multiply_panels(const Job& job, int64_t panel, int64_t panels, int64_t begin, int64_t end) {
  const bool folded = job.scale_dtype == UINT8, whole = folded || job.groups == 1;
  const int64_t rows = end - begin, padded = (rows + 2 * TILE - 1) / (2 * TILE) * 2 * TILE;
  const int64_t group_tiles = job.group_steps / DEPTH;
  const int64_t wanted = rows <= SOME_ROWS ? SOME_TILES : BLOCK_TILES, stream = rows <= SOME_ROWS ? stream_ahead() : 0;
  const int64_t block = whole ? wanted : std::max<int64_t>(1, wanted / group_tiles) * group_tiles;
  const int64_t all = (job.steps + DEPTH - 1) / DEPTH, sums_size = padded * PANEL * 4;
  const int64_t bytes_size = 4 * std::min(block, all) * TILE_BYTES;
  char* memory = scratch.take(size_t(bytes_size + panels * sums_size));
  if (!memory) return false;
  uint8_t* bytes = reinterpret_cast<uint8_t*>(memory);
  char* sums = memory + bytes_size;
  if (!whole) std::memset(sums, 0, size_t(panels * sums_size));
  Waiting waiting;
  const TileConfiguration configuration;
  TILE_CONFIGURE(configuration);
  for (int64_t t = 0; t < all; t += block) {
    const int64_t tiles = std::min(block, all - t), steps = std::min(tiles * DEPTH, job.steps - t * DEPTH);
    for (int64_t p = 0; p < panels; ++p) {
      const Tile tile = panel_tile(job, panel + p);
      if (folded) unpack_folded(tile, t * DEPTH, steps, tiles, bytes, stream);
      else unpack_codes(tile.weight, t * DEPTH, steps, tiles, bytes, stream);
      clear_rest(steps, tiles, bytes);
      const bool last = p + 1 == panels;  // then the first panel's next inputs follow
      const int64_t units = (rows + 2 * TILE - 1) / (2 * TILE) * 2 * tiles;
      Ahead ahead{reinterpret_cast<const char*>(job.weight) +
                      ((panel + (last ? 0 : p + 1)) * job.steps + (last ? t + tiles : t) * DEPTH) * STEP_BYTES,
                  stream ? 0 : (steps * STEP_BYTES / 64 + units - 1) / units};
      for (int64_t row = 0; row < rows; row += 2 * TILE)
        for (int64_t half = 0; half < 2; ++half) {
          const bool two = rows - row > TILE;
          const int8_t* a = job.codes + (begin + row) * job.code_stride + t * 64;
          const uint8_t* b = bytes + half * tiles * 2 * TILE_BYTES;
          char* own = sums + p * sums_size + row * PANEL * 4 + half * 4 * TILE_BYTES;
          if (whole) {
            const auto run = two ? sum_whole<2> : sum_whole<1>;
            run(a, job.code_stride, b, tiles, reinterpret_cast<int32_t*>(own), t == 0, ahead);
          } else {
            const int64_t scale = job.scale_dtype == FLOAT32 ? 4 : 2;
            const auto run = group_tiles == 1 ? (two ? sum_groups<2, true> : sum_groups<1, true>)
                                              : (two ? sum_groups<2, false> : sum_groups<1, false>);
            run(a, job.code_stride, b, tiles, group_tiles,
                tile.scales + (t / group_tiles * PANEL + half * 32) * scale, job.scale_dtype,
                reinterpret_cast<float*>(own), ahead, waiting);
          }
        }
    }
  }
  TILE_RELEASE();
  scale_waiting(waiting, job.scale_dtype);
  for (int64_t row = 0; row < rows; row += TILE)
    for (int64_t p = 0; p < panels; ++p) {
      alignas(64) float scaled[TILE * PANEL], bias[PANEL];
      const Tile tile = panel_tile(job, panel + p);
      const int64_t some = std::min(TILE, rows - row), strip = row / (2 * TILE) * 2 * TILE;
      const char* own = sums + p * sums_size + strip * PANEL * 4 + (row - strip) / TILE * 2 * TILE_BYTES;
      gather_rows(own, 4 * TILE_BYTES, folded ? reinterpret_cast<const char*>(tile.bases) : tile.scales,
                  folded ? FLOAT32 : job.scale_dtype, whole, some, scaled);
      Epilogue(job, panel + p, bias).store(begin + row, some, scaled);
    }
  return true;
}

void multiply(const Job& job, int64_t panel, int64_t panels, int64_t begin, int64_t end, int64_t next) {
  const int64_t rows = end - begin;
  const bool folded = job.scale_dtype == UINT8, whole = folded || job.groups == 1;
  const bool few = whole && rows >= FEW_FROM && rows <= FEW_ROWS;
  if (!few && rows >= ROWS_FROM && (whole || job.group_steps % DEPTH == 0) &&
      multiply_panels(job, panel, panels, begin, end))
    return;
  for (int64_t p = 0; p < panels; ++p) {
    if (few) (folded ? multiply_few<true> : multiply_few<false>)(job, panel + p, begin, end);
    else AVX512_PATH.multiply(job, panel + p, 1, begin, end, p + 1 < panels ? panel + p + 1 : next);
  }
}

double peak(int64_t rounds) {
  const TileConfiguration configuration;
  TILE_CONFIGURE(configuration);
  clear_sums<2>();
  TILE_ZERO(4);
  TILE_ZERO(5);
  TILE_ZERO(6);
  TILE_ZERO(7);
  for (int64_t i = 0; i < rounds; ++i) {
    TILE_MULTIPLY_INT8(0, 4, 6);
    TILE_MULTIPLY_INT8(1, 4, 7);
    TILE_MULTIPLY_INT8(2, 5, 6);
    TILE_MULTIPLY_INT8(3, 5, 7);
  }
  TILE_RELEASE();
  return double(rounds) * 4 * 2 * TILE * TILE * 64;
}

}  // namespace

const Path AMX_PATH{"amx", quantize_rows, multiply, peak, 256, 2 * TILE, 4};
