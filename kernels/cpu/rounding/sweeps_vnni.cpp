// Whole sweeps over a weight's columns, for some outputs at a time: no output knows of another, so that a thread decides all
// columns of its own without waiting. What a block of columns leaves to those behind is a product of whole numbers (whole.h)
// with a matrix that was packed once for all sweeps.
#include <algorithm>
#include <cstring>
#include "job.h"
#include "whole.h"

namespace {

constexpr int64_t SPAN = MOST_SWEPT, SPAN_BYTES = SPAN / STEPS * TILE_BYTES;  // of 16 lines
constexpr int64_t HELD = 16;                                                  // vectors of sums in registers

int64_t whole(int64_t count, int64_t size) { return (count + size - 1) / size * size; }
int64_t spans_of(const Swept& matrix) { return whole(matrix.factor.lines, SPAN) / SPAN; }
int64_t tiles_of(const Swept& matrix) { return whole(matrix.factor.lines, TILE) / TILE; }

int64_t bytes(const Swept& matrix) {
  return tiles_of(matrix) * spans_of(matrix) * (SPAN_BYTES + TILE * int64_t(sizeof(float)));
}

Place place(const Swept& matrix, int64_t tile, int64_t span) {
  const int64_t at = span * tiles_of(matrix) + tile;  // as they are read, one tile after another
  float* scales = reinterpret_cast<float*>(matrix.words + tiles_of(matrix) * spans_of(matrix) * SPAN_BYTES);
  return {matrix.words + at * SPAN_BYTES, scales + at * TILE};
}

// What stands on the diagonal, and one block of it: what its columns leave to each other. Compensation leaves what it lost by
// the column that lost it, descent by the column that gets it.
void corner(const Swept& matrix, int64_t first) {
  const Factor& factor = matrix.factor;
  const int64_t width = std::min(matrix.block, factor.lines - first);
  float* to = matrix.corners + first * matrix.block;
  const auto at = [&](int64_t j, int64_t i) { return factor.numbers[j * factor.line_stride + i * factor.step_stride]; };
  for (int64_t j = 0; j < width; ++j) matrix.bend[first + j] = at(first + j, first + j);
  for (int64_t j = 0; j < width; ++j)
    for (int64_t i = 0; i < width; ++i)
      to[j * width + i] = i < j ? at(first + j, first + i) / matrix.bend[first + (matrix.ahead ? i : j)] : 0.0f;
}

// A tile of lines in all spans that are wanted of it, and the blocks of the diagonal that begin in it.
void pack(const Swept& matrix, int64_t tile) {
  const Factor& factor = matrix.factor;
  const int64_t line = tile * TILE;
  for (int64_t span = 0; span < spans_of(matrix); ++span) {
    const int64_t step = span * SPAN;
    if (matrix.ahead && step > line) break;  // columns decided later leave nothing to these
    Place own = place(matrix, tile, span);
    std::memset(own.tiles, 0, size_t(SPAN_BYTES));
    const auto pack_span = factor.step_stride == 1 ? pack_by_line : pack_by_step;
    pack_span(factor, line, step, std::min(SPAN, factor.lines - step), {&own, nullptr});
  }
  for (int64_t first = whole(line, matrix.block); first < std::min(line + TILE, factor.lines); first += matrix.block)
    corner(matrix, first);
}

// Where one thread works on its outputs: LANES of them side by side.
struct Desk {
  float *work, *steps, *codes, *left;  // [k, LANES], [groups, LANES], [MOST_SWEPT, LANES] twice
  int8_t* small;                       // [MOST_SWEPT, LANES]
  char* words;                         // of a span, LANES / TILE tiles
  float* scales;                       // [LANES]
};

int64_t desk_bytes(const Sweep& job) {
  const int64_t rows = whole(job.matrix->factor.lines, TILE) + job.groups + 2 * MOST_SWEPT + 1;
  return rows * LANES * int64_t(sizeof(float)) + MOST_SWEPT * LANES + LANES / TILE * SPAN_BYTES;
}

Desk desk(const Sweep& job, int thread) {
  Desk made;
  made.work = reinterpret_cast<float*>(job.scratch + thread * desk_bytes(job));
  made.steps = made.work + whole(job.matrix->factor.lines, TILE) * LANES;
  made.codes = made.steps + job.groups * LANES;
  made.left = made.codes + MOST_SWEPT * LANES;
  made.scales = made.left + MOST_SWEPT * LANES;
  made.words = reinterpret_cast<char*>(made.scales + LANES);
  made.small = reinterpret_cast<int8_t*>(made.words + LANES / TILE * SPAN_BYTES);
  return made;
}

// Adds, for lines from `line` to `end`, times `share`, the products with the packed span's steps from `step` on, in V vectors of
// outputs. Lines of a multiple of 16.
template <int V>
void tell(const Swept& matrix, const Desk& own, int64_t line, int64_t end, int64_t step, int64_t steps, float share) {
  constexpr int64_t AT_ONCE = HELD / V;
  const int64_t tiles = (steps + STEPS - 1) / STEPS;
  __m512 scales[V];
  for (int v = 0; v < V; ++v) scales[v] = _mm512_mul_ps(_mm512_load_ps(own.scales + v * TILE), _mm512_set1_ps(share));
  for (; line < end; line += AT_ONCE) {
    const Place from = place(matrix, line / TILE, step / SPAN);
    const char* lines = from.tiles + step % SPAN / STEPS * TILE_BYTES + line % TILE * 64;
    for (int64_t tile = 0; tile < tiles; ++tile)  // of the next tile as many lines
      for (int64_t i = 0; i < AT_ONCE; ++i) __builtin_prefetch(lines + SPAN_BYTES + tile * TILE_BYTES + i * 64);
    __m512i sums[AT_ONCE][V];
    for (auto& row : sums)
      for (auto& sum : row) sum = _mm512_setzero_si512();
    for (int64_t tile = 0; tile < tiles; ++tile)
#pragma GCC unroll 16
      for (int64_t word = 0; word < TILE; ++word) {
        __m512i columns[V];
        for (int v = 0; v < V; ++v) columns[v] = _mm512_load_si512(own.words + v * SPAN_BYTES + tile * TILE_BYTES + word * 64);
#pragma GCC unroll 8
        for (int64_t i = 0; i < AT_ONCE; ++i) {
          int32_t number;
          std::memcpy(&number, lines + tile * TILE_BYTES + i * 64 + word * 4, 4);
          for (int v = 0; v < V; ++v) add_products(sums[i][v], _mm512_set1_epi32(number), columns[v]);
        }
      }
    for (int64_t i = 0; i < AT_ONCE; ++i) {
      const __m512 by = _mm512_set1_ps(from.scales[line % TILE + i]);
      float* to = own.work + (line + i) * LANES;
      for (int v = 0; v < V; ++v) {
        const __m512 made = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[i][v]), _mm512_mul_ps(scales[v], by));
        _mm512_store_ps(to + v * TILE, _mm512_add_ps(_mm512_load_ps(to + v * TILE), made));
      }
    }
  }
}

void tell(const Swept& matrix, const Desk& own, int64_t outputs, int64_t line, int64_t end, int64_t step, int64_t steps,
          float share) {
  (outputs > LANES / 2 ? tell<4> : tell<2>)(matrix, own, line, whole(end, TILE), step, steps, share);
}

// Packs a span of what outputs have by steps: `left`, or rows of their own.
void pack_outputs(const Desk& own, const Factor& outputs, int64_t step, int64_t steps) {
  for (int64_t lane = 0; lane < LANES; lane += TILE) {
    Place to{own.words + lane / TILE * SPAN_BYTES, own.scales + lane};
    std::memset(to.scales, 0, TILE * sizeof(float));
    if (lane < outputs.lines)
      (outputs.step_stride == 1 ? pack_by_line : pack_by_step)(outputs, lane, step, steps, {nullptr, &to});
  }
}

void pack_left(const Desk& own, int64_t steps) { pack_outputs(own, {own.left, LANES, 1, LANES}, 0, steps); }

// 16 rows of 16 numbers each, from memory whose rows are `stride` apart, turned.
template <class Read>
void turned(int64_t rows, Read read, __m512i (&made)[TILE]) {
  for (int64_t i = 0; i < TILE; ++i) made[i] = i < rows ? read(i) : _mm512_setzero_si512();
  turn(made);
}

// Numbers [count, steps], rows `stride` apart, to [steps, LANES].
void to_lanes(const float* from, int64_t stride, int64_t count, int64_t steps, float* to) {
  __m512i part[TILE];
  for (int64_t lane = 0; lane < LANES; lane += TILE)
    for (int64_t step = 0; step < steps; step += TILE) {
      const __mmask16 mask = first(steps - step);
      turned(count - lane, [&](int64_t i) { return _mm512_maskz_loadu_epi32(mask, from + (lane + i) * stride + step); }, part);
      for (int64_t i = 0; i < std::min(TILE, steps - step); ++i) _mm512_store_si512(to + (step + i) * LANES + lane, part[i]);
    }
}

void from_lanes(const float* from, int64_t count, int64_t steps, float* to, int64_t stride) {
  __m512i part[TILE];
  for (int64_t lane = 0; lane < count; lane += TILE)
    for (int64_t step = 0; step < steps; step += TILE) {
      turned(steps - step, [&](int64_t i) { return _mm512_load_si512(from + (step + i) * LANES + lane); }, part);
      for (int64_t i = 0; i < std::min(TILE, count - lane); ++i)
        _mm512_mask_storeu_epi32(to + (lane + i) * stride + step, first(steps - step), part[i]);
    }
}

void codes_to_lanes(const int8_t* from, int64_t stride, int64_t count, int64_t steps, float* to) {
  __m512i part[TILE];
  for (int64_t lane = 0; lane < LANES; lane += TILE)
    for (int64_t step = 0; step < steps; step += TILE) {
      const __mmask16 mask = first(steps - step);
      const auto read = [&](int64_t i) {
        return __m512i(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, from + (lane + i) * stride + step))));
      };
      turned(count - lane, read, part);
      for (int64_t i = 0; i < std::min(TILE, steps - step); ++i) _mm512_store_si512(to + (step + i) * LANES + lane, part[i]);
    }
}

template <class Read>
void codes_from_lanes(Read read, int64_t count, int64_t steps, int8_t* to, int64_t stride) {
  __m512i part[TILE];
  for (int64_t lane = 0; lane < count; lane += TILE)
    for (int64_t step = 0; step < steps; step += TILE) {
      turned(steps - step, [&](int64_t i) { return read((step + i) * LANES + lane); }, part);
      for (int64_t i = 0; i < std::min(TILE, count - lane); ++i)
        _mm_mask_storeu_epi8(to + (lane + i) * stride + step, first(steps - step), _mm512_cvtepi32_epi8(part[i]));
    }
}

Desk begun(const Sweep& job, int thread, int64_t output, int64_t count) {
  const Desk own = desk(job, thread);
  for (int64_t group = 0; group < job.groups; ++group)
    for (int64_t i = 0; i < LANES; ++i)
      own.steps[group * LANES + i] = i < count ? job.steps[(output + i) * job.groups + group] : 1.0f;
  return own;
}

void round(const Sweep& job, const ColumnLoops& loops, int thread, int64_t output, int64_t count) {
  const Swept& matrix = *job.matrix;
  const int64_t k = matrix.factor.lines;
  const Desk own = begun(job, thread, output, count);
  to_lanes(job.numbers + output * k, k, count, k, own.work);
  for (int64_t first = 0; first < k; first += matrix.block) {
    const int64_t width = std::min(matrix.block, k - first);
    const Spread spread{matrix.corners + first * matrix.block, width, job.low, job.high};
    loops.round({spread, own.work + first * LANES, own.steps, job.group + first, LANES, LANES, own.small, own.left}, 0, LANES);
    const auto read = [&](int64_t at) {
      return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(own.small + at)));
    };
    codes_from_lanes(read, count, width, job.codes + output * k + first, k);
    if (first + width == k) return;
    for (int64_t i = 0; i < width; ++i)
      for (int64_t lane = 0; lane < LANES; lane += TILE) {
        float* at = own.left + i * LANES + lane;
        _mm512_store_ps(at, _mm512_div_ps(_mm512_load_ps(at), _mm512_set1_ps(matrix.bend[first + i])));
      }
    pack_left(own, width);
    tell(matrix, own, count, first + width, k, first, width, -1.0f);
  }
}

void descend(const Sweep& job, const ColumnLoops& loops, int thread, int64_t output, int64_t count) {
  const Swept& matrix = *job.matrix;
  const int64_t k = matrix.factor.lines, size = job.sweeps ? k / job.groups : k;
  const Desk own = begun(job, thread, output, count);
  std::memset(own.work, 0, size_t(whole(k, TILE) * LANES) * sizeof(float));
  for (int64_t step = 0; step < k; step += SPAN) {
    const int64_t steps = std::min(SPAN, k - step);
    pack_outputs(own, {job.numbers + output * k, count, k, 1}, step, steps);
    tell(matrix, own, count, 0, k, step, steps, 1.0f);
  }
  if (job.before) from_lanes(own.work, count, k, job.before + output * k, k);
  for (int64_t sweep = 0; sweep < job.sweeps; ++sweep) {
    const bool follow = job.after || sweep + 1 < job.sweeps;
    for (int64_t first = 0; first < k; first += matrix.block) {
      const int64_t width = std::min(matrix.block, k - first);
      int8_t* codes = job.codes + output * k + first;
      codes_to_lanes(codes, k, count, width, own.codes);
      const Spread spread{matrix.corners + first * matrix.block, width, job.low, job.high};
      const float* step = own.steps + first / size * LANES;
      loops.descend({spread, own.work + first * LANES, step, matrix.bend + first, LANES, own.codes, own.left}, 0, LANES);
      codes_from_lanes([&](int64_t at) { return _mm512_cvtps_epi32(_mm512_load_ps(own.codes + at)); }, count, width, codes, k);
      if (!follow && first + width == k) return;
      pack_left(own, width);
      tell(matrix, own, count, follow ? 0 : first + width, k, first, width, 1.0f);
    }
  }
  if (job.after) from_lanes(own.work, count, k, job.after + output * k, k);
}

}  // namespace

const SweepLoops VNNI_SWEEPS{supported, bytes, pack, desk_bytes, round, descend};
