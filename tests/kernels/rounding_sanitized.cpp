// Runs the rounding loops on random blocks in vectors of exactly the size that they say.
//
// Compiled with AddressSanitizer and UndefinedBehaviorSanitizer. Every code must be in range, and what is left of an
// entry must be less than half a step unless its code is at an end.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>
#include "job.h"

extern "C" {
const char* qtr_path_name(int path);
int qtr_path_supported(int path);
void qtr_round(int path, const Rounding* job);
void qtr_descend(int path, const Descent* job);
}

namespace {

std::mt19937 random_bits(1);
int64_t upto(int64_t most) { return int64_t(random_bits() % uint64_t(most + 1)); }
float number() { return float(upto(2000)) / 1000.0f - 1.0f; }

std::vector<float> numbers(int64_t count) {
  std::vector<float> made(size_t(count), 0.0f);
  for (float& each : made) each = number();
  return made;
}

void expect(bool right) {
  if (!right) std::abort();
}

void run(int path) {
  const int64_t columns = 1 + upto(MOST_COLUMNS - 1), n = 1 + upto(200), groups = 1 + upto(3), stride = n + upto(9);
  const float low = -8.0f, high = 7.0f;
  std::vector<float> spread = numbers(columns * columns), weight = numbers((columns - 1) * stride + n);
  for (float& each : spread) each *= 0.01f;
  std::vector<float> steps(size_t(groups * n), 0.25f), lost(size_t(columns * n), 0.0f);
  std::vector<int64_t> group(size_t(columns), 0);
  for (int64_t& each : group) each = upto(groups - 1);
  std::vector<int8_t> codes(size_t(columns * n), 100);
  const Spread carried{spread.data(), columns, low, high};
  const Rounding rounding{carried, weight.data(), steps.data(), group.data(), n, stride, codes.data(), lost.data()};
  qtr_round(path, &rounding);
  for (size_t i = 0; i < codes.size(); ++i) {
    expect(codes[i] >= low && codes[i] <= high);
    expect(codes[i] == low || codes[i] == high || std::fabs(lost[i]) <= 0.125001f);
  }
  std::vector<float> slope = numbers(columns * n), step(size_t(n), 0.25f), bend(size_t(columns), 1.0f);
  std::vector<float> now(size_t(columns * n), 0.0f), moved(size_t(columns * n), 0.0f);
  for (float& each : now) each = float(upto(15)) - 8.0f;
  const std::vector<float> before = now;
  const Descent descent{carried, slope.data(), step.data(), bend.data(), n, now.data(), moved.data()};
  qtr_descend(path, &descent);
  for (size_t i = 0; i < now.size(); ++i) {
    expect(now[i] >= low && now[i] <= high && now[i] == std::floor(now[i]));
    expect(moved[i] == (now[i] - before[i]) * 0.25f);
  }
}

}  // namespace

int main() {
  int runs = 0;
  for (int path = 0; qtr_path_name(path); ++path)
    for (int i = 0; qtr_path_supported(path) && i < 50; ++i, ++runs) run(path);
  std::printf("%d runs\n", runs);
}
