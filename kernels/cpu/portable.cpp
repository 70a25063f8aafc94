// The path for any CPU: plain C++ over the shared layout, exact, and as fast as the compiler's baseline flags allow.
#include "rows.h"

namespace {

float scale_at(const Tile& tile, int64_t index) {
  if (!tile.scales_bfloat16) {
    float value;
    std::memcpy(&value, tile.scales + index * 4, 4);
    return value;
  }
  uint16_t value;
  std::memcpy(&value, tile.scales + index * 2, 2);
  return bfloat16_to_float(value);
}

void run_row(const Tile& tile, int row) {
  const int8_t* codes = tile.codes + row * tile.code_stride;
  float* sums = tile.sums + row * PANEL;
  std::fill(sums, sums + PANEL, 0.0f);
  for (int64_t g = 0; g < tile.groups; ++g) {
    const int64_t first = g * tile.group_steps, last = std::min(tile.steps, first + tile.group_steps);
    int32_t total[PANEL];
    std::fill(total, total + PANEL, tile.starts[(row * tile.groups + g) * 2]);
    for (int64_t step = first; step < last; ++step) {
      const uint8_t* w = tile.weight + step * STEP_BYTES;
      const int8_t* a = codes + step * 4;
      for (int half = 0; half < 2; ++half) {
        int32_t* low = total + half * 32;
        int32_t* high = low + 16;
        for (int lane = 0; lane < 16; ++lane)
          for (int byte = 0; byte < 4; ++byte) {
            const int32_t pair = w[half * 64 + lane * 4 + byte];
            low[lane] += (pair & 15) * a[byte];
            high[lane] += (pair >> 4) * a[byte];
          }
      }
    }
    for (int64_t i = 0; i < PANEL; ++i) sums[i] += float(total[i]) * scale_at(tile, g * PANEL + i);
  }
}

void multiply(const Job& job, int64_t panel, int64_t begin, int64_t end, int64_t next) {
  multiply_rows<4>(job, panel, begin, end, next, [](const Tile& tile, int rows) {
    for (int r = 0; r < rows; ++r) run_row(tile, r);
  });
}

}  // namespace

const Path PORTABLE_PATH{"portable", quantize_rows, multiply, nullptr};
