// Attention of tokens to themselves and those before them, in float32. Compiled once for each instruction set; vectors are the
// compiler's. A task is some queries of one head: their scores stay in the nearest cache, and keys behind the last are not read.
#include <algorithm>
#include <cstring>
#include "job.h"
#include "vectors.h"

namespace {

constexpr int64_t HELD = WIDTH == 16 ? 8 : 4;  // rows whose sums are in registers, two vectors each
constexpr int64_t PANEL = 2 * WIDTH;           // keys that lie side by side, [width][PANEL]

int64_t padded(const Attention& job) { return (job.length + PANEL - 1) / PANEL * PANEL; }

int64_t scratch(const Attention& job) { return 2 * job.sequences * job.sources * padded(job) * job.width; }

// Keys of a source of a sequence, [panels][width][PANEL], and its values, [width / PANEL][tokens][PANEL].
float* keys(const Attention& job, int64_t source) { return job.scratch + 2 * source * padded(job) * job.width; }
float* values(const Attention& job, int64_t source) { return keys(job, source) + padded(job) * job.width; }

const float* row(const Lanes& lanes, int64_t sequence, int64_t head, int64_t token) {
  return lanes.numbers + sequence * lanes.sequence_stride + head * lanes.head_stride + token * lanes.token_stride;
}

// Zeros behind the last token.
void pack(const Attention& job, int64_t source) {
  for (int64_t token = 0; token < padded(job); ++token) {
    const bool there = token < job.length;
    const auto from = [&](const Lanes& lanes) {
      return row(lanes, source / job.sources, source % job.sources, there ? token : 0);
    };
    const float *key = from(job.key), *value = from(job.value);
    float* turned = keys(job, source) + token / PANEL * PANEL * job.width + token % PANEL;
    for (int64_t i = 0; i < job.width; ++i) turned[i * PANEL] = there ? key[i] : 0.0f;
    for (int64_t i = 0; i < job.width; i += PANEL) {
      float* to = values(job, source) + i * padded(job) + token * PANEL;
      for (int64_t j = 0; j < PANEL; ++j) to[j] = there ? value[i + j] : 0.0f;
    }
  }
}

// sums[r] = the sum over i of left[r, i] right[i], two vectors of it, for HELD rows.
inline void multiply(const float* left, int64_t left_stride, const float* right, int64_t right_stride, int64_t count,
                     Vector (&sums)[HELD][2]) {
  Vector own[HELD][2] = {};
  for (int64_t i = 0; i < count; ++i) {
    const Vector first = load(right + i * right_stride), second = load(right + i * right_stride + WIDTH);
    for (int64_t r = 0; r < HELD; ++r) {
      const float by = left[r * left_stride + i];
      own[r][0] += first * by, own[r][1] += second * by;
    }
  }
  std::memcpy(&sums, &own, sizeof own);
}

// The first `count` scores of a row become weights, zeros behind them up to `end`; returns one over their sum.
float soften(float* scores, int64_t count, int64_t end) {
  for (int64_t i = count; i < end; ++i) scores[i] = scores[count - 1];
  Vector most = load(scores);
  for (int64_t i = WIDTH; i < end; i += WIDTH) {
    const Vector x = load(scores + i);
    most = x > most ? x : most;
  }
  float largest = most[0];
  for (int64_t i = 1; i < WIDTH; ++i) largest = std::max(largest, most[i]);
  Vector sums{};
  for (int64_t i = 0; i < end; i += WIDTH) {
    Vector made = exponential(load(scores + i) - largest);
    if (i + WIDTH > count)
      for (int64_t j = std::max<int64_t>(0, count - i); j < WIDTH; ++j) made[j] = 0.0f;
    store(made, scores + i);
    sums += made;
  }
  float sum = 0;
  for (int64_t i = 0; i < WIDTH; ++i) sum += sums[i];
  return 1.0f / sum;
}

void attend(const Attention& job, int64_t sequence, int64_t head, int64_t first) {
  alignas(64) float queries[QUERIES * MOST_WIDTH], scores[QUERIES * MOST_LENGTH], inverse[QUERIES];
  const int64_t count = std::min(QUERIES, job.length - first), width = job.width;
  const int64_t source = sequence * job.sources + head / (job.heads / job.sources);
  const int64_t last = first + count, end = (last + PANEL - 1) / PANEL * PANEL;
  Vector sums[HELD][2];
  for (int64_t r = 0; r < QUERIES; ++r) {
    const float* from = row(job.query, sequence, head, first + std::min(r, count - 1));
    for (int64_t i = 0; i < width; ++i) queries[r * width + i] = from[i] * job.scale;
  }
  for (int64_t at = 0; at < end; at += PANEL)
    for (int64_t r = 0; r < count; r += HELD) {
      multiply(queries + r * width, width, keys(job, source) + at * width, PANEL, width, sums);
      for (int64_t i = 0; i < HELD; ++i) std::memcpy(scores + (r + i) * end + at, sums[i], sizeof sums[i]);
    }
  for (int64_t r = 0; r < count; ++r) inverse[r] = soften(scores + r * end, first + r + 1, end);
  for (int64_t r = 0; r < count; r += HELD)
    for (int64_t i = 0; i < width; i += PANEL) {
      multiply(scores + r * end, end, values(job, source) + i * padded(job), PANEL, std::min(last, first + r + HELD), sums);
      for (int64_t q = r; q < std::min(count, r + HELD); ++q) {
        float* to = job.made + ((sequence * job.length + first + q) * job.heads + head) * width + i;
        for (int64_t v = 0; v < 2; ++v) store(sums[q - r][v] * inverse[q], to + v * WIDTH);
      }
    }
}

}  // namespace

extern const AttentionLoops TABLE;
const AttentionLoops TABLE = {scratch, pack, attend};
