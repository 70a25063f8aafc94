// What a decoder layer does between its products, in one pass. Compiled once for each instruction set; vectors are the compiler's.
#include <cmath>
#include "job.h"
#include "vectors.h"

namespace {

void norm(const Norm& job, int64_t first, int64_t count) {
  for (int64_t row = first; row < first + count; ++row) {
    const float* from = job.x + row * job.k;
    Vector squares{};
    each_vector(0, job.k, [&](int64_t i, int64_t some) {
      const Vector x = load(from + i, some);
      squares += x * x;
    });
    float sum = 0;
    for (int64_t i = 0; i < WIDTH; ++i) sum += squares[i];
    const float inverse = 1.0f / std::sqrt(sum / float(job.k) + job.epsilon);
    each_vector(0, job.k, [&](int64_t i, int64_t some) {
      store(load(from + i, some) * inverse * load(job.weight + i, some), job.made + row * job.k + i, some);
    });
  }
}

void gate(const Gate& job, int64_t first, int64_t count) {
  each_vector(first, first + count, [&](int64_t i, int64_t some) {
    const Vector x = load(job.gate + i, some), shrunk = exponential(x < 0.0f ? x : -x);
    const Vector share = (x < 0.0f ? shrunk : Vector{} + 1.0f) / (1.0f + shrunk);
    store(x * share * load(job.up + i, some), job.made + i, some);
  });
}

}  // namespace

extern const LayerLoops TABLE;
const LayerLoops TABLE = {norm, gate};
