// A linear layer left in bfloat16: its arguments, the weight layout, and the functions each code path fills in.
//
// Weight layout "cpu-panel64 bfloat16": panels of 64 output channels; inside a panel, 256 bytes for every 2 inputs
// ("step"): the two values of channel 0, of channel 1, ... of channel 63. Inputs are padded to a multiple of 2 and
// channels to a multiple of 64, with zeros.
//
// Or compressed, 192 bytes a step: the values of a panel have few different upper bytes (sign and seven bits of the
// exponent), so a table has 16 of them and a nibble says which. For the two halves of a step, 64 values each:
//
//     byte   0 .. 63: lower bytes of half 0   64 .. 127: of half 1   128 .. 191: numbers, half 1 in the high nibbles
//
// where byte 16 l + i belongs to value 8 l + i of the half if i < 8, else to value 32 + 8 l + i - 8: vectors of lower and
// upper bytes, interleaved in parts of 16, then are the values in order. A list has the values whose upper byte is in no
// table; they are put in place before anything is multiplied, so products are those of the plain layout, bit for bit.
//
// A channel's products are added in float32 in an order that depends on the path and on nothing else, so a token's result is
// the same in every batch and on any number of threads.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bfloat16 {

constexpr int64_t PANEL = 64, STEP = 2;  // output channels a panel, inputs a step
constexpr int64_t VALUES = PANEL * STEP, STEP_BYTES = 256, COMPRESSED_BYTES = 192;  // of a step
constexpr int64_t ENTRIES = 16;      // of a panel's table
constexpr int64_t BLOCK_STEPS = 64;  // of a panel, which stay in L1 while several tiles of tokens pass them
constexpr int64_t MOST_TOKENS = 48;  // of one call of `multiply`: what they add up meanwhile stays in L1, too

struct Job {
  const char* x;          // tokens, bfloat16 or float32 as the path wants them, [m, 2 * steps]
  int64_t x_stride, x_step;  // bytes from token to token, from step to step
  int64_t n, steps;
  const char* weight;     // [panels, steps, 256], or compressed [panels, steps, 192]
  const uint8_t* tables;  // of compressed weights [panels, 16], or null
  const int64_t* starts;  // [panels + 1]: where in `rest` a panel's values begin
  const int64_t* rest;    // value | place in the panel's plain layout << 16, places ascending
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
extern const Path AMX_PATH, AVX512_PATH, AVX2_PATH;
#endif

}  // namespace bfloat16
