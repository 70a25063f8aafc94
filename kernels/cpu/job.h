// What one W4A8 call is made of: the arguments, the weight layout, and the table of functions each code path fills.
//
// Weight layout "cpu-panel64": panels of 64 output channels; inside a panel, 128 bytes for every 4 inputs ("step"):
//
//     byte          0  1  2  3 | 4  5  6  7 | ...  | 60 .. 63 || 64 .. 127
//     input k+      0  1  2  3   0  1  2  3          0 .. 3      the same for
//     low  nibble   channel 0    channel 1           channel 15  channels 32..47
//     high nibble   channel 16   channel 17          channel 31  channels 48..63
//
// A nibble stores w + 8 (0..15). A 64-byte word is therefore two operands of the dot-product instructions (unsigned
// weights times signed activations, four bytes summed into each 32-bit lane), a mask away and a subtraction. The + 8 is undone by
// starting every sum at -8 * sum(activation codes of the group), which quantization computes on the way.
// Inputs are padded to a multiple of 4 (their codes are 0), channels to a multiple of 64 (their scales are 0).
#pragma once
#include <cstddef>
#include <cstdint>

constexpr int64_t PANEL = 64;        // output channels a panel
constexpr int64_t STEP_BYTES = 128;  // bytes of a panel for one step of 4 inputs

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, UINT8 = 3 };

// Folded groups (see folded.py; layout "cpu-panel64 folded") have scales of type UINT8, [panels, 4 + groups, 64]: four
// rows are 64 float32 bases, the others each group's multiples, int8 -15..16. Sums of all groups are then one int32.
constexpr int64_t BASE_ROWS = 4;

struct Job {
  const char* x;        // activations [m, k], rows x_stride elements apart
  int64_t x_stride;
  bool gated;           // rows of x are [gate, up], 2 k long; the activation is silu(gate) * up
  Dtype dtype;          // of x and y
  int64_t m, k, n;
  int64_t steps;        // ceil(k / 4)
  int64_t group_steps;  // steps that share a scale
  int64_t groups;       // ceil(steps / group_steps)
  const uint8_t* weight;
  const char* scales;   // [panels, groups, 64], or folded
  Dtype scale_dtype;    // FLOAT32, BFLOAT16 or UINT8
  const char* bias;     // [n] or null
  Dtype bias_dtype;
  char* y;              // [m, n], contiguous
  // Filled by quantization, row by row:
  int8_t* codes;        // [m, code_stride]
  int64_t code_stride;
  int32_t* starts;      // [m, groups, 2]: what sums of a group start at, -8 * sum(codes), and of whole bytes, 17 times that
  int32_t* wholes;      // [m]: -128 * sum(codes of all groups)
  float* token_scales;  // [m]
};

struct Path {
  const char* name;
  // Quantize rows [begin, end) of job.x into codes, starts and token_scales.
  void (*quantize)(const Job& job, int64_t begin, int64_t end);
  // Compute rows [begin, end) of the 64 channels of each of `panels` panels from `panel` on; `next` is the one this thread
  // will want next (or -1).
  void (*multiply)(const Job& job, int64_t panel, int64_t panels, int64_t begin, int64_t end, int64_t next);
  // Do nothing but this path's dot products from registers, `rounds` times; returns operations (2 a product).
  double (*peak)(int64_t rounds);
  int64_t block;  // rows quantized and multiplied before the next ones
  int64_t rows;   // they are divided in multiples of this
  int64_t span;   // panels that share what many rows cost, at most
};

extern const Path PORTABLE_PATH;
#if defined(__x86_64__)
extern const Path AVX2_PATH, AVXVNNI_PATH, AVX512_PATH, AMX_PATH;
#endif
