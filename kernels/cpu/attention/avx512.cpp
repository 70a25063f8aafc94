// Attention with bfloat16 dot products (AVX512-BF16): scores of 512 keys, softmax, values, up to 6 rows at a time.
#include <immintrin.h>
#include <algorithm>
#include <cstring>
#include "job.h"

namespace {

constexpr int64_t KEYS = 512;          // keys between two rescalings of the sums
constexpr int64_t PANEL = 64;          // columns of a panel
constexpr int64_t PAIRS = 2 * PANEL;   // numbers of a panel for one pair of rows
constexpr int64_t GROUP = 32;          // keys that surely lie in one page
constexpr int ROWS = 6;                // of a tile: 24 sums, 4 words and a broadcast in 32 registers
constexpr int MOST = TILE_ROWS;        // of a tile where AMX multiplies
static_assert(GROUP == TILE_DEPTH, "heads, and keys that are looked at, come in whole operands");
constexpr float MASKED = -1e30f;       // a score that is none; infinity would make NaN of its distance to the maximum
constexpr float LOG2E = 1.4426950408889634f;

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Rows 2p and 2p + 1 of 32 columns become 32 pairs, for ceil(rows / 2) pairs; a missing last row is 0.
void interleave(const Bfloat16* from, int64_t stride, int64_t rows, Bfloat16* to) {
  alignas(64) static constexpr uint16_t LOW[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                   8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(LOW), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t row = 0; row < rows; row += 2, to += PAIRS) {
    const __m512i a = _mm512_loadu_si512(from + row * stride);
    const __m512i b = row + 1 < rows ? _mm512_loadu_si512(from + (row + 1) * stride) : _mm512_setzero_si512();
    _mm512_store_si512(to, _mm512_permutex2var_epi16(a, low, b));
    _mm512_store_si512(to + 32, _mm512_permutex2var_epi16(a, high, b));
  }
}

// c[R, 16 C] = c * factors + a[R, 2 steps] b, or without the sum where factors is null. b is a panel; steps > 0.
// gcc 12 keeps a copy of every sum in memory, too, unless it is told to unroll before it allocates registers.
template <int R, int C>
void product(const Bfloat16* a, int64_t a_stride, const Bfloat16* b, int64_t steps, float* c, int64_t c_stride,
             const float* factors) {
  __m512 sum[R][C];
  if (factors) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < C; ++i)
        sum[r][i] = _mm512_mul_ps(_mm512_loadu_ps(c + r * c_stride + 16 * i), _mm512_set1_ps(factors[r]));
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < C; ++i) sum[r][i] = _mm512_setzero_ps();
  }
  do {
    __m512i word[C];
#pragma GCC unroll 8
    for (int i = 0; i < C; ++i) word[i] = _mm512_load_si512(b + 32 * i);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      std::memcpy(&pair, a + r * a_stride, 4);
      const __m512i both = _mm512_set1_epi32(pair);
#pragma GCC unroll 8
      for (int i = 0; i < C; ++i) sum[r][i] = _mm512_dpbf16_ps(sum[r][i], (__m512bh)word[i], (__m512bh)both);
    }
    a += 2, b += PAIRS;
  } while (--steps);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < C; ++i) _mm512_storeu_ps(c + r * c_stride + 16 * i, sum[r][i]);
}

using Product = void (*)(const Bfloat16*, int64_t, const Bfloat16*, int64_t, float*, int64_t, const float*);
constexpr Product PRODUCTS[ROWS][2] = {{product<1, 2>, product<1, 4>}, {product<2, 2>, product<2, 4>},
                                       {product<3, 2>, product<3, 4>}, {product<4, 2>, product<4, 4>},
                                       {product<5, 2>, product<5, 4>}, {product<6, 2>, product<6, 4>}};

// The same for any number of columns, a multiple of 32; panels of b are panel_stride numbers apart.
void products(int rows, int64_t columns, const Bfloat16* a, int64_t a_stride, const Bfloat16* b, int64_t panel_stride,
              int64_t steps, float* c, int64_t c_stride, const float* factors) {
  for (int64_t at = 0; at < columns; at += PANEL, b += panel_stride)
    PRODUCTS[rows - 1][columns - at > GROUP](a, a_stride, b, steps, c + at, c_stride, factors);
}

// 2**x to 9e-5 of its value, and 1 for 0, where rounding to bfloat16 then takes 2e-3: a minimax polynomial for the fraction.
// Below 2**-126 it is 0: Intel's CPUs take ten times as long where results are denormal.
__m512 exp2(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 y = _mm512_fmadd_ps(_mm512_set1_ps(0.07706705339f), f, _mm512_set1_ps(0.22764497878f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.69511678922f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_GE_OQ);
  return _mm512_maskz_scalef_ps(normal, y, x);  // y * 2**floor(x)
}

// One row of scores [columns], of which the first `limit` count, becomes weights 2**(score * scale - maximum), `columns` a
// multiple of 32. Raises the row's maximum, adds to its sum, and returns what to multiply earlier sums with.
float softmax(float* scores, int64_t columns, int64_t limit, float scale, float& maximum, float& sum, Bfloat16* weights) {
  for (int64_t at = limit / 16 * 16; at < columns; at += 16)
    _mm512_mask_storeu_ps(scores + at, __mmask16(0xffff << std::max<int64_t>(0, limit - at)), _mm512_set1_ps(MASKED));
  __m512 most[2] = {_mm512_set1_ps(MASKED), _mm512_set1_ps(MASKED)};
  for (int64_t at = 0; at < columns; at += 32)
    for (int i = 0; i < 2; ++i) most[i] = _mm512_max_ps(_mm512_loadu_ps(scores + at + 16 * i), most[i]);
  const float before = maximum;
  maximum = std::max(before, _mm512_reduce_max_ps(_mm512_max_ps(most[0], most[1])) * scale);
  const __m512 times = _mm512_set1_ps(scale), shift = _mm512_set1_ps(maximum);
  __m512 total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t at = 0; at < columns; at += 32) {
    __m512 weight[2];
    for (int i = 0; i < 2; ++i) {
      weight[i] = exp2(_mm512_fmsub_ps(_mm512_loadu_ps(scores + at + 16 * i), times, shift));
      total[i] = _mm512_add_ps(total[i], weight[i]);
    }
    const __m512bh both = _mm512_cvtne2ps_pbh(weight[1], weight[0]);
    std::memcpy(weights + at, &both, 64);
  }
  const float factor = _mm_cvtss_f32(_mm512_castps512_ps128(exp2(_mm512_set1_ps(before - maximum))));
  sum = sum * factor + _mm512_reduce_add_ps(_mm512_add_ps(total[0], total[1]));
  return factor;
}

// The parts of a task's scratch, one behind the other.
struct Memory {
  Bfloat16 *query, *keys, *values, *weights;  // [rows, dim], panels, panels, [MOST, KEYS]
  float *output, *maximum, *sum, *scores;     // [rows, dim], [rows], [rows], [MOST, SCORES]
  int64_t bytes = 0;

  Memory(int64_t rows, int64_t dim, char* from) {
    const int64_t wide = round_up(dim, PANEL);
    rows = round_up(rows, MOST);  // whole tiles
    take(query, rows * dim, from), take(keys, KEYS * dim, from), take(values, KEYS * wide, from);
    take(weights, MOST * KEYS, from), take(output, rows * dim, from), take(maximum, rows, from);
    take(sum, rows, from), take(scores, MOST * SCORES, from);
  }
  static constexpr int64_t SCORES = KEYS + 16;  // rows a power of two apart would meet in the same cache sets

  template <class T>
  void take(T*& part, int64_t count, char* from) {
    part = reinterpret_cast<T*>(from + bytes);
    bytes += round_up(count * int64_t(sizeof(T)), 64);
  }
};

// Bring keys [first, first + count) of a task and their values into panels.
void pack(const Attention& call, const Task& task, int64_t first, int64_t count, const Memory& memory) {
  const int32_t* pages = call.table + task.sequence * call.table_stride;
  for (int64_t at = 0; at < count; at += GROUP) {
    const int64_t key = first + at;
    const int64_t page = pages[key / call.page] * call.page_stride + task.key_head * call.head_stride;
    interleave(call.keys + page + key % call.page, call.page, call.dim,
               memory.keys + at / PANEL * PANEL * call.dim + at % PANEL * 2);
    const Bfloat16* values = call.values + page + key % call.page * call.dim;
    const int64_t rows = std::min(GROUP, count - at);
    for (int64_t column = 0; column < call.dim; column += GROUP) {
      Bfloat16* to = memory.values + column / PANEL * PANEL * KEYS + column % PANEL * 2 + at * PANEL;
      interleave(values + column, call.dim, rows, to);
      for (int64_t pair = (rows + 1) / 2; pair < GROUP / 2; ++pair) std::memset(to + pair * PAIRS, 0, GROUP * 4);
    }
  }
}

}  // namespace

int64_t attention_scratch(const Attention& call, int64_t rows) { return Memory(rows, call.dim, nullptr).bytes; }

void attend(const Attention& call, const Task& task, char* scratch) {
  const int64_t heads = call.heads / call.key_heads, rows = task.count * heads, dim = call.dim;
  const int64_t position = task.keys - task.count;  // of the task's first query
  const float scale = float(call.scale) * LOG2E;
  const int64_t token = call.starts[task.sequence] + task.first, column = task.key_head * heads * dim;
  const Memory memory(rows, dim, scratch);
  for (int64_t i = 0; i < task.count; ++i)
    std::memcpy(memory.query + i * heads * dim, call.query + (token + i) * call.query_stride + column, heads * dim * 2);
  const bool tiles = call.tiles && rows >= TILE_ROWS;
  const int most = tiles ? TILE_ROWS : ROWS;
  if (tiles) tiles_begin();
  std::fill_n(memory.maximum, rows, MASKED);
  std::fill_n(memory.sum, rows, 0.0f);
  for (int64_t first = 0; first < task.keys; first += KEYS) {
    const int64_t count = std::min(KEYS, task.keys - first);
    pack(call, task, first, count, memory);
    for (int64_t row = std::max<int64_t>(0, first - position) * heads; row < rows; row += most) {  // others see none
      const int tile = int(std::min<int64_t>(most, rows - row));
      const int64_t seen = std::min(count, position + (row + tile - 1) / heads + 1 - first);  // by the tile's last row
      const int64_t columns = round_up(seen, GROUP);
      const Bfloat16* query = memory.query + row * dim;
      float* output = memory.output + row * dim;
      if (tiles)
        tiles_products(columns, query, dim, memory.keys, PANEL * dim, dim / TILE_DEPTH, memory.scores, Memory::SCORES,
                       nullptr);
      else products(tile, columns, query, dim, memory.keys, PANEL * dim, dim / 2, memory.scores, Memory::SCORES, nullptr);
      float factors[MOST] = {};
      for (int r = 0; r < tile; ++r) {
        const int64_t limit = std::min(seen, position + (row + r) / heads + 1 - first);
        factors[r] = softmax(memory.scores + r * Memory::SCORES, columns, limit, scale, memory.maximum[row + r],
                             memory.sum[row + r], memory.weights + r * KEYS);
      }
      const float* earlier = first ? factors : nullptr;
      if (tiles)
        tiles_products(dim, memory.weights, KEYS, memory.values, PANEL * KEYS, columns / TILE_DEPTH, output, dim, earlier);
      else products(tile, dim, memory.weights, KEYS, memory.values, PANEL * KEYS, (seen + 1) / 2, output, dim, earlier);
    }
  }
  if (tiles) tiles_end();
  for (int64_t row = 0; row < rows; ++row) {
    const __m512 inverse = _mm512_set1_ps(1.0f / memory.sum[row]);
    Bfloat16* to = call.output + (token + row / heads) * call.output_stride + column + row % heads * dim;
    for (int64_t i = 0; i < dim; i += 32) {
      const float* from = memory.output + row * dim + i;
      const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_mul_ps(_mm512_loadu_ps(from + 16), inverse),
                                                _mm512_mul_ps(_mm512_loadu_ps(from), inverse));
      std::memcpy(to + i, &both, 64);
    }
  }
}

double attention_peak(int64_t rounds) {
  __m512 sum[24];
  for (int i = 0; i < 24; ++i) sum[i] = _mm512_set1_ps(float(i));
  __m512bh a = (__m512bh)_mm512_set1_epi32(0), b = a;
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int i = 0; i < 24; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], a, b);
    asm volatile("" : "+v"(a), "+v"(b));  // keeps the loop
  }
  for (int i = 0; i < 24; ++i) asm volatile("" : : "v"(sum[i]));
  return double(rounds) * 24 * 64;
}
