// What the code paths of bfloat16 layers share: how tokens are divided into tiles and blocks, the rounding of results.
#pragma once
#include <algorithm>
#include <cstring>
#include "bfloat16.h"
#include "stream.h"

namespace {

using bfloat16::COMPRESSED_BYTES;
using bfloat16::Job;
using bfloat16::PANEL;
using bfloat16::STEP_BYTES;
using bfloat16::VALUES;

inline float widened(uint16_t value) {
  const uint32_t bits = uint32_t(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

inline uint16_t rounded(float value) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t near = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : near);
}

inline void store(const Job& job, int64_t panel, int64_t token, int64_t tokens, const float* sums) {
  const int64_t channel = panel * PANEL, count = std::min(PANEL, job.n - channel);
  float bias[PANEL] = {};
  if (job.bias)
    for (int64_t i = 0; i < count; ++i) bias[i] = widened(job.bias[channel + i]);
  for (int64_t t = 0; t < tokens; ++t, sums += PANEL) {
    uint16_t out[PANEL];
    for (int i = 0; i < PANEL; ++i) out[i] = rounded(sums[i] + bias[i]);
    std::memcpy(job.y + (token + t) * job.n + channel, out, size_t(count) * 2);
  }
}

// What one tile adds to its sums [tokens, 64]: some steps of a panel.
struct Part {
  int tokens;
  int64_t steps;
  const char* w;
  const char* x;
  float* sums;
  const char* ahead;  // what is brought near meanwhile, `ahead_stride` bytes a step
  int64_t ahead_stride;
  bool alone;         // the only tile of its panel
};

// Compressed steps of a panel, from step `first` on, and those of its values that must be put in place.
struct Compressed {
  const char* w;
  const uint8_t* table;
  int64_t first, steps;
  const int64_t *rest, *rest_end;

  // The step that a value of `rest` is in, counted from `first`.
  int64_t step(const int64_t* value) const { return (*value >> 16) / VALUES - first; }
};

// Put a value of `rest` into its step's plain layout.
inline void put(int64_t value, char* step) {
  const uint16_t bits = uint16_t(value);
  std::memcpy(step + (value >> 16) % VALUES * 2, &bits, 2);
}

// Tokens [begin, end) in balanced tiles of at most Own::MOST. A tile that is alone fetches ahead of itself (stream.h); of
// several, or if weights are compressed, each fetches its share of the next block. Own::add adds a part;
// Own::Block::prepare looks at compressed steps before the tiles come, Own::add_compressed adds them.
template <class Own>
void multiply_tiles(const Job& job, int64_t panel, int64_t begin, int64_t end) {
  const int64_t tokens = end - begin, tiles = (tokens + Own::MOST - 1) / Own::MOST;
  const bool compressed = job.tables != nullptr, alone = tiles == 1;
  const int64_t bytes = compressed ? COMPRESSED_BYTES : STEP_BYTES;
  const int64_t block = alone && !compressed ? std::max<int64_t>(job.steps, 1) : bfloat16::BLOCK_STEPS;
  alignas(64) float sums[bfloat16::MOST_TOKENS * PANEL];
  std::memset(sums, 0, size_t(tokens * PANEL) * sizeof(float));
  const int64_t* rest = compressed ? job.rest + job.starts[panel] : nullptr;
  typename Own::Block prepared;
  for (int64_t first = 0; first < job.steps; first += block) {
    const int64_t steps = std::min(block, job.steps - first);
    const char* w = job.weight + (panel * job.steps + first) * bytes;
    if (compressed) {
      Compressed own{w, job.tables + panel * bfloat16::ENTRIES, first, steps, rest, rest};
      for (; rest < job.rest + job.starts[panel + 1] && own.step(rest) < steps; ++rest) {}
      own.rest_end = rest;
      prepared.prepare(own);
    }
    for (int64_t t = 0, token = 0; t < tiles; ++t) {
      const int many = int(tokens / tiles + (t < tokens % tiles));
      const char* x = job.x + (begin + token) * job.x_stride + first * job.x_step;
      const char* ahead = alone && !compressed ? w + stream_ahead() : w + steps * bytes + t * (steps * bytes / tiles);
      const Part part{many, steps, w, x, sums + token * PANEL, ahead, bytes / tiles, alone};
      if (compressed) Own::add_compressed(job, part, prepared);
      else Own::add(job, part);
      token += many;
    }
  }
  store(job, panel, begin, tokens, sums);
}

}  // namespace
