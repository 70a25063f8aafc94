// What one call of attention is made of: queries of several sequences, and keys and values in vLLM's paged cache.
//
// A page holds `page` tokens of one key/value head, keys first, so that a row of 16-bit numbers is
//
//     keys    [dim, page]     one element of all tokens        value of token t:  keys[0][t], keys[1][t], ...
//     values  [page, dim]     one token                                           values[t][0], values[t][1], ...
//
// The instruction that multiplies bfloat16 takes pairs: both are brought into panels of 64 columns (tokens, or elements
// of a value) in which a 32-bit word holds rows 2p and 2p + 1 of its column. See avx512.cpp.
#pragma once
#include <cstdint>

using Bfloat16 = uint16_t;

struct Attention {
  const Bfloat16* query;  // [tokens, heads, dim], tokens query_stride elements apart
  Bfloat16* output;       // likewise, output_stride apart
  const Bfloat16* keys;   // head h of page b starts at b * page_stride + h * head_stride
  const Bfloat16* values;  // likewise
  const int32_t* table;    // [sequences, table_stride]: a sequence's pages
  const int32_t* starts;   // [sequences + 1]: where in `query` a sequence's tokens start
  const int32_t* lengths;  // [sequences]: tokens of a sequence in the cache, its queries being the last of them
  int64_t query_stride, output_stride, page_stride, head_stride, table_stride;
  int64_t sequences, heads, key_heads, dim, page;
  double scale;
  bool tiles;  // AMX multiplies where there are rows enough
};

// What changes from step to step of a batch whose calls are repeated.
struct Batch {
  const int32_t *table, *starts, *lengths;
  int64_t table_stride;
  const int64_t* slots;  // [new tokens], see qta_step
};

// Queries [first, first + count) of a sequence, for the heads that share one key/value head.
struct Task {
  int64_t sequence, key_head, first, count;
  int64_t keys;  // that its last query sees
};

// Products with AMX (amx.cpp) of 16 rows, where the process may use it: c[16, columns] = c * factors + a[16, 32 depths] b, or
// without the sum where factors is null. Columns are a multiple of 32; panels of b are panel_stride numbers apart. Tile
// registers are the thread's between begin and end. Weak: a compiler that does not know AMX leaves them out.
constexpr int TILE_ROWS = 16;
constexpr int64_t TILE_DEPTH = 32;
__attribute__((weak)) void tiles_begin();
__attribute__((weak)) void tiles_end();
__attribute__((weak)) void tiles_products(int64_t columns, const Bfloat16* a, int64_t a_stride, const Bfloat16* b, int64_t panel_stride,
                    int64_t depths, float* c, int64_t c_stride, const float* factors);

// Bytes of scratch that a task of `rows` rows (queries times heads) takes.
int64_t attention_scratch(const Attention& call, int64_t rows);
void attend(const Attention& call, const Task& task, char* scratch);
// Do nothing but this path's dot products, `rounds` times 24, from registers; returns operations (2 a product).
double attention_peak(int64_t rounds);
