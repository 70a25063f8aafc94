// What the code paths of bfloat16 layers share: how tokens are divided into tiles and blocks, the rounding of results.
#pragma once
#include <algorithm>
#include <cstring>
#include "bfloat16.h"

namespace {

using bfloat16::Job;
using bfloat16::PANEL;
using bfloat16::STEP_BYTES;

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

// Tokens [begin, end) in balanced tiles of at most `most`; add(tokens, w, x, steps, sums, ahead, ahead_stride, alone) adds
// `steps` steps of one tile to sums [tokens, 64]. A tile that is alone fetches 4 KB ahead of itself; of several, each
// fetches its share of the next block.
template <int most, class Add>
void multiply_tiles(const Job& job, int64_t panel, int64_t begin, int64_t end, Add add) {
  const int64_t tokens = end - begin, tiles = (tokens + most - 1) / most;
  const int64_t block = tiles == 1 ? std::max<int64_t>(job.steps, 1) : bfloat16::BLOCK_STEPS;
  alignas(64) float sums[bfloat16::MOST_TOKENS * PANEL];
  std::memset(sums, 0, size_t(tokens * PANEL) * sizeof(float));
  const char* weight = job.weight + panel * job.steps * STEP_BYTES;
  for (int64_t first = 0; first < job.steps; first += block) {
    const int64_t steps = std::min(block, job.steps - first);
    const char* w = weight + first * STEP_BYTES;
    for (int64_t t = 0, token = 0; t < tiles; ++t) {
      const int many = int(tokens / tiles + (t < tokens % tiles));
      const char* x = job.x + (begin + token) * job.x_stride + first * job.x_step;
      const char* ahead = tiles == 1 ? w + 4096 : w + steps * STEP_BYTES + t * (steps * STEP_BYTES / tiles);
      add(many, w, x, steps, sums + token * PANEL, ahead, STEP_BYTES / tiles, tiles == 1);
      token += many;
    }
  }
  store(job, panel, begin, tokens, sums);
}

}  // namespace
