// bfloat16 layers with AMX: up to 16 tokens by the 64 channels of a panel at a time, or up to 32 by half of them.
//
// A row of a tile of weights is a step of 16 channels, as it lies: a step is four such rows side by side. Compressed steps are
// restored to where a tile can be loaded from, one tile's at a time (with more, memory waits while they are multiplied). Sums are in tiles over
// all inputs. An instruction adds the products of 32 inputs, those of even and of odd ones apart, then both to the sum: not the
// order of the other paths, but the same for every token beside whatever others.
//
// Registers: 0..3 sums (tokens 0, channels 0..3; or tokens 0, channels 0 and 1, tokens 1, ...), 4 and 5 tokens, 6 and 7 weights.
#include <immintrin.h>
#include "bfloat16_expand.h"
#include "bfloat16_tile.h"
#include "tiles.h"

namespace {

constexpr int64_t TOKENS = 16, DEPTH = 16;           // rows of a tile: tokens, steps
constexpr int64_t ROW = 64;                          // bytes
constexpr int64_t HALF_BYTES = STEP_BYTES / 2, LINE = 64;

// What comes some KB behind the next `BYTES` bytes, see stream.h.
template <int64_t BYTES>
inline void fetch(const char* from) {
  for (int64_t line = 0; line < BYTES; line += LINE) {
    _mm_prefetch(from + FAR_AHEAD + line, _MM_HINT_T1);
    _mm_prefetch(from + NEAR_AHEAD + line, _MM_HINT_T0);
  }
}

// Tokens 0..16 in tiles 0 to 3 and 4, or 16 in 0, 1 and 4 and the rest in 2, 3 and 5.
TileConfiguration configuration(int64_t tokens) {
  TileConfiguration made;
  const uint8_t first = uint8_t(std::min(tokens, TOKENS)), second = uint8_t(tokens - TOKENS);
  for (int tile = 0; tile < 6; ++tile) {
    const bool behind = tokens > TOKENS && (tile == 2 || tile == 3 || tile == 5);
    made.rows[tile] = behind ? second : first;
  }
  return made;
}

// Weights as tiles are loaded: rows of steps `stride` bytes apart.
struct Rows {
  const char* at;
  int64_t stride;
};

// One tile of steps: all 64 channels of up to 16 tokens.
inline void add_panel(const char* x, int64_t x_stride, Rows w) {
  TILE_LOAD(4, x, x_stride);
  TILE_LOAD(6, w.at, w.stride);
  TILE_MULTIPLY_BFLOAT16(0, 4, 6);
  TILE_LOAD(7, w.at + ROW, w.stride);
  TILE_MULTIPLY_BFLOAT16(1, 4, 7);
  TILE_LOAD(6, w.at + 2 * ROW, w.stride);
  TILE_MULTIPLY_BFLOAT16(2, 4, 6);
  TILE_LOAD(7, w.at + 3 * ROW, w.stride);
  TILE_MULTIPLY_BFLOAT16(3, 4, 7);
}

// One tile of steps: 32 channels of 17 to 32 tokens.
inline void add_half(const char* x, int64_t x_stride, Rows w) {
  TILE_LOAD(4, x, x_stride);
  TILE_LOAD(6, w.at, w.stride);
  TILE_MULTIPLY_BFLOAT16(0, 4, 6);
  TILE_LOAD(7, w.at + ROW, w.stride);
  TILE_MULTIPLY_BFLOAT16(1, 4, 7);
  TILE_LOAD(5, x + TOKENS * x_stride, x_stride);
  TILE_MULTIPLY_BFLOAT16(2, 5, 6);
  TILE_MULTIPLY_BFLOAT16(3, 5, 7);
}

// What a thread restores weights to, and the last inputs of its tokens where they fill no tile.
struct Buffers {
  alignas(64) char weights[DEPTH * STEP_BYTES];
  alignas(64) char tokens[2 * TOKENS * ROW];
};

// Steps [first, first + steps) of a panel, at most a tile's, both halves or one, in `to`; zeros up to whole tiles. `rest` is where
// the values of the panel that no table names begin; returned is where those behind these steps do.
template <bool WHOLE>
const int64_t* restore(const Job& job, int64_t panel, int64_t first, int64_t steps, int64_t half, const int64_t* rest, char* to) {
  constexpr int64_t BYTES = WHOLE ? STEP_BYTES : HALF_BYTES;
  const bool compressed = job.tables != nullptr;
  const int64_t bytes = compressed ? COMPRESSED_BYTES : STEP_BYTES;
  const char* from = job.weight + (panel * job.steps + first) * bytes;
  if (!compressed) {
    for (int64_t i = 0; i < steps; ++i) std::memcpy(to + i * BYTES, from + i * bytes + half * HALF_BYTES, size_t(BYTES));
  } else {
    const Upper upper(job.tables + panel * bfloat16::ENTRIES);
    for (int64_t i = 0; i < steps; ++i, from += bytes) {
      if (WHOLE || half == 0)  // the other half finds these steps in L2
        fetch<COMPRESSED_BYTES>(from);
      if (WHOLE) upper.restore(from, 0, to + i * BYTES), upper.restore(from, 1, to + i * BYTES + HALF_BYTES);
      else upper.restore(from, half, to + i * BYTES);
    }
    const Compressed own{nullptr, nullptr, first, steps, rest, nullptr};
    for (const int64_t* end = job.rest + job.starts[panel + 1]; rest < end && own.step(rest) < steps; ++rest) {
      const int64_t place = (*rest >> 16) % VALUES * 2;
      if (WHOLE || place / HALF_BYTES == half) put(*rest, to + own.step(rest) * BYTES - (WHOLE ? 0 : half * HALF_BYTES));
    }
  }
  const int64_t filled = (steps + DEPTH - 1) / DEPTH * DEPTH;
  std::memset(to + steps * BYTES, 0, size_t((filled - steps) * BYTES));
  return rest;
}

// The sums of `tokens` tokens, up to 16 and then WHOLE, or up to 32, and 64 or 32 channels.
template <bool WHOLE>
void sum(const Job& job, int64_t panel, int64_t token, int64_t tokens, int64_t half, Buffers& buffers, float* sums) {
  constexpr int64_t BYTES = WHOLE ? STEP_BYTES : HALF_BYTES;
  const auto add = [](const char* x, int64_t stride, Rows w) { WHOLE ? add_panel(x, stride, w) : add_half(x, stride, w); };
  const char* x = job.x + token * job.x_stride;
  const int64_t *rest = job.tables ? job.rest + job.starts[panel] : nullptr, whole = job.steps / DEPTH * DEPTH;
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  if (!job.tables) {
    const char* w = job.weight + panel * job.steps * STEP_BYTES + half * HALF_BYTES;
    for (int64_t step = 0; step < whole; step += DEPTH, x += ROW, w += DEPTH * STEP_BYTES) {
      if (WHOLE || half == 0)
        fetch<DEPTH * STEP_BYTES>(w);
      add(x, job.x_stride, {w, STEP_BYTES});
    }
  } else {
    for (int64_t first = 0; first < whole; first += DEPTH, x += ROW) {
      rest = restore<WHOLE>(job, panel, first, DEPTH, half, rest, buffers.weights);
      add(x, job.x_stride, {buffers.weights, BYTES});
    }
  }
  if (whole < job.steps) {  // inputs behind the last whole tile: what is beside them in memory may be anything
    restore<WHOLE>(job, panel, whole, job.steps - whole, half, rest, buffers.weights);
    const size_t left = size_t((job.steps - whole) * job.x_step);
    for (int64_t t = 0; t < tokens; ++t) {
      char* to = buffers.tokens + t * ROW;
      std::memset(to, 0, size_t(ROW));
      std::memcpy(to, x + t * job.x_stride, left);
    }
    add(buffers.tokens, ROW, {buffers.weights, BYTES});
  }
  float* to = sums + half * (PANEL / 2);
  TILE_STORE(0, to, PANEL * 4);
  TILE_STORE(1, to + TOKENS, PANEL * 4);
  float* more = WHOLE ? to + 2 * TOKENS : to + TOKENS * PANEL;
  TILE_STORE(2, more, PANEL * 4);
  TILE_STORE(3, more + TOKENS, PANEL * 4);
}

void multiply(const Job& job, int64_t panel, int64_t begin, int64_t end) {
  Buffers buffers;
  alignas(64) float sums[2 * TOKENS * PANEL];
  for (int64_t token = begin; token < end;) {
    const int64_t tokens = std::min(2 * TOKENS, end - token);
    const TileConfiguration own = configuration(tokens);
    TILE_CONFIGURE(own);
    if (tokens <= TOKENS) {
      sum<true>(job, panel, token, tokens, 0, buffers, sums);
    } else {
      sum<false>(job, panel, token, tokens, 0, buffers, sums);
      sum<false>(job, panel, token, tokens, 1, buffers, sums);
    }
    TILE_RELEASE();
    store(job, panel, token, tokens, sums);
    token += tokens;
  }
}

}  // namespace

const bfloat16::Path bfloat16::AMX_PATH{"amx", 2, multiply};
