// A linear layer left in bfloat16: its arguments, the weight layout, and the functions each code path fills in.
//
// Weight layout "cpu-panel64 bfloat16": panels of 64 output channels; inside a panel, 256 bytes for every 2 inputs
// ("step"): the two values of channel 0, of channel 1, ... of channel 63. Inputs are padded to a multiple of 2 and
// channels to a multiple of 64, with zeros.
//
// A channel's products are added in float32 in the order of its inputs, so a token's result is the same in every batch
// and on any number of threads.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bfloat16 {

constexpr int64_t PANEL = 64, STEP = 2;    // output channels a panel, inputs a step
constexpr int64_t STEP_BYTES = 256;
constexpr int64_t BLOCK_STEPS = 64;        // of a panel, which stay in L1 while several tiles of tokens pass them
constexpr int64_t MOST_TOKENS = 48;        // of one call of `multiply`: what they add up meanwhile stays in L1, too

struct Job {
  const char* x;          // tokens, bfloat16 or float32 as the path wants them, [m, 2 * steps]
  int64_t x_stride, x_step;  // bytes from token to token, from step to step
  int64_t n, steps;
  const char* weight;     // [panels, steps, 256]
  const uint16_t* bias;   // [n] or null
  uint16_t* y;            // [m, n]
};

struct Path {
  const char* name;
  int64_t element;  // bytes of an activation in job.x: 2 as they come, 4 as floats
  // Compute up to MOST_TOKENS tokens of the 64 channels of `panel`.
  void (*multiply)(const Job& job, int64_t panel, int64_t begin, int64_t end);
};

#if defined(__x86_64__)
extern const Path AVX512_PATH, AVX2_PATH;
#endif

}  // namespace bfloat16
