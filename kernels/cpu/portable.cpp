// The path for any CPU: plain C++ over the shared layout, exact, in loops that compilers vectorize for any target.
#include "rows.h"

namespace {

constexpr int MOST_ROWS = 4;
constexpr int64_t CHUNK = 4;  // steps, so 16 inputs: |sum| <= 16 * 15 * 128 = 30720 fits int16

float scale_at(const Tile& tile, int64_t index) {
  if (tile.scale_dtype != BFLOAT16) {
    float value;
    std::memcpy(&value, tile.scales + index * 4, 4);
    return value;
  }
  uint16_t value;
  std::memcpy(&value, tile.scales + index * 2, 2);
  return bfloat16_to_float(value);
}

// One step of a panel as int16 [4, 64], input-major.
void decode(const uint8_t* step, int16_t* __restrict out) {
  uint32_t words[32];  // four bytes each: inputs; two nibbles a byte: channels
  std::memcpy(words, step, sizeof(words));
  for (int byte = 0; byte < 4; ++byte)
    for (int half = 0; half < 2; ++half)
      for (int lane = 0; lane < 16; ++lane) {
        const uint32_t pair = words[half * 16 + lane] >> (8 * byte);
        out[byte * PANEL + half * 32 + lane] = int16_t(pair & 15);
        out[byte * PANEL + half * 32 + 16 + lane] = int16_t(pair >> 4 & 15);
      }
}

void run_tile(const Tile& tile, int rows) {
  int32_t total[MOST_ROWS][PANEL];
  int16_t weights[CHUNK * 4 * PANEL];
  const bool folded = tile.scale_dtype == UINT8;
  if (folded) std::fill(tile.totals, tile.totals + rows * PANEL, 0);
  else std::fill(tile.sums, tile.sums + rows * PANEL, 0.0f);
  for (int64_t g = 0; g < tile.groups; ++g) {
    for (int r = 0; r < rows; ++r) std::fill(total[r], total[r] + PANEL, tile.starts[(r * tile.groups + g) * 2]);
    const int64_t first = g * tile.group_steps, last = std::min(tile.steps, first + tile.group_steps);
    for (int64_t step = first; step < last; step += CHUNK) {
      const int64_t steps = std::min(CHUNK, last - step);
      for (int64_t s = 0; s < steps; ++s) decode(tile.weight + (step + s) * STEP_BYTES, weights + s * 4 * PANEL);
      for (int r = 0; r < rows; ++r) {
        const int8_t* a = tile.codes + r * tile.code_stride + step * 4;
        int16_t sum[PANEL] = {};
        for (int64_t i = 0; i < steps * 4; ++i) {
          const int16_t code = a[i];
          for (int c = 0; c < PANEL; ++c) sum[c] = int16_t(sum[c] + weights[i * PANEL + c] * code);
        }
        for (int c = 0; c < PANEL; ++c) total[r][c] += sum[c];
      }
    }
    for (int r = 0; r < rows; ++r)
      for (int64_t c = 0; c < PANEL; ++c) {
        const int64_t own = r * PANEL + c, index = g * PANEL + c;
        if (folded) tile.totals[own] += total[r][c] * int8_t(tile.scales[index]);
        else tile.sums[own] += float(total[r][c]) * scale_at(tile, index);
      }
  }
  if (folded) scale_totals(tile, rows);
}

void multiply(const Job& job, int64_t panel, int64_t, int64_t begin, int64_t end, int64_t next) {
  multiply_rows<MOST_ROWS>(job, panel, begin, end, next, stream_ahead(), run_tile);
}

}  // namespace

const Path PORTABLE_PATH{"portable", quantize_rows, multiply, nullptr, BLOCK_ROWS, 12, 1};
