// Runs the loops of quantization and sums on random numbers in vectors of exactly the size that they say.
//
// Compiled with AddressSanitizer and UndefinedBehaviorSanitizer. Every code must be in range, and what is left of an
// entry must be less than half a step unless its code is at an end; in absmax scaling none is.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>
#include "job.h"

extern "C" {
const char* qtr_path_name(int path);
int qtr_path_supported(int path);
void qtr_round(int path, const Rounding* job);
void qtr_descend(int path, const Descent* job);
void qtr_nearest(int path, const Nearest* job);
void qtr_trials(int path, const Trials* job);
void qtr_restore(int path, const Restored* job);
void qtr_norm(int path, const Norm* job);
void qtr_gate(int path, const Gate* job);
int64_t qtr_attention_scratch(int path, const Attention* job);
void qtr_attend(int path, const Attention* job);
const char* qtr_sums_name(int path);
int qtr_sums_supported(int path);
int64_t qtr_sums_scratch(int path, const Sum* job);
void qtr_sum(int path, const Sum* job);
int qtr_sweeps_supported();
int64_t qtr_sweep_bytes(const Swept* matrix);
void qtr_sweep_pack(const Swept* matrix);
int64_t qtr_sweep_scratch(const Sweep* job);
void qtr_sweep(int path, const Sweep* job);
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

void run_grid(int path) {
  const int64_t n = 1 + upto(20), size = 1 + upto(70), k = size * (1 + upto(4)), stride = k + upto(9), groups = k / size;
  const std::vector<float> weight = numbers((n - 1) * stride + k), times(size_t(k), 2.0f), matter(size_t(k), 1.0f);
  const Grid grid{weight.data(), n, k, stride, size, -8.0f, 7.0f};
  std::vector<float> made(size_t(n * k), 100.0f);
  std::vector<uint16_t> halves(size_t(n * k), 0);
  const bool some = upto(1);
  const Nearest nearest{grid, some ? times.data() : nullptr, 1e-7f, 0, made.data()};
  const Nearest shorter{grid, nullptr, 1e-7f, 1, halves.data()};
  qtr_nearest(path, &nearest);
  qtr_nearest(path, &shorter);
  for (int64_t row = 0; row < n; ++row)
    for (int64_t i = 0; i < k; ++i)  // the largest has code 7: half a step is a 14th of at most 2
      expect(std::fabs(made[size_t(row * k + i)] - weight[size_t(row * stride + i)] * (some ? 2.0f : 1.0f)) < 0.144f);
  const int64_t count = 1 + upto(MOST_TRIALS - 1);
  const std::vector<float> scales(size_t(n * groups * count), 0.25f);
  std::vector<float> errors(scales.size(), -1.0f);
  const Trials trials{grid, matter.data(), scales.data(), count, errors.data()};
  qtr_trials(path, &trials);
  for (const float each : errors) expect(each >= 0.0f && each <= float(size) * 0.0157f);  // codes end at 1.75
  const std::vector<int8_t> codes(size_t(n * k), -3);
  const std::vector<float> steps(size_t(n * groups), 0.5f);
  const Restored restored{codes.data(), steps.data(), some ? weight.data() : nullptr, n, k, stride, groups, made.data()};
  qtr_restore(path, &restored);
  for (int64_t row = 0; row < n; ++row)
    for (int64_t i = 0; i < k; ++i)
      expect(std::fabs(made[size_t(row * k + i)] + 1.5f + (some ? weight[size_t(row * stride + i)] : 0.0f)) < 1e-6f);
}

// Ones in a head's values come out as ones whatever the scores; a norm of equal numbers is one, and a gate of zeros zero.
void run_layer(int path) {
  const int64_t sequences = 1 + upto(1), sources = 1 + upto(2), heads = sources * (1 + upto(2)), length = 1 + upto(90);
  const int64_t width = HEAD_STEP * (1 + upto(3));
  const auto lies = [&](const std::vector<float>& from, int64_t count) {
    return Lanes{from.data(), length * count * width, width, count * width};
  };
  const std::vector<float> query = numbers(sequences * length * heads * width), key = numbers(sequences * length * sources * width);
  const std::vector<float> ones(key.size(), 1.0f);
  std::vector<float> made(query.size(), 100.0f);
  Attention job{lies(query, heads), lies(key, sources), lies(ones, sources), sequences, heads, sources, length, width, 0.3f, made.data(), nullptr};
  std::vector<float> scratch(size_t(qtr_attention_scratch(path, &job)), 0.0f);
  job.scratch = scratch.data();
  qtr_attend(path, &job);
  for (const float each : made) expect(std::fabs(each - 1.0f) < 1e-5f);

  const int64_t n = 1 + upto(20), k = 1 + upto(70);
  const std::vector<float> equal(size_t(n * k), -3.0f), twice(size_t(k), 2.0f), none(size_t(n * k), 0.0f);
  std::vector<float> normed(equal.size(), 100.0f), gated(equal.size(), 100.0f);
  const Norm norm{equal.data(), twice.data(), n, k, 1e-6f, normed.data()};
  qtr_norm(path, &norm);
  for (const float each : normed) expect(std::fabs(each + 2.0f) < 1e-5f);
  const Gate gate{none.data(), equal.data(), n * k, gated.data()};
  qtr_gate(path, &gate);
  for (const float each : gated) expect(each == 0.0f);
}

// Small whole numbers in factors that lie in either way: sums are exact. A matrix with itself is packed once, and of a total
// a half may be left. The scratch ends where nobody may write.
void run_sum(int path) {
  const int64_t m = 1 + upto(90), steps = 1 + upto(1400);
  const bool alone = upto(1), left_by_line = upto(1), right_by_line = alone ? left_by_line : upto(1);
  const int64_t n = alone ? m : 1 + upto(90), stride = n + upto(9);
  const Half half = Half(upto(2));
  const auto whole = [](int64_t count) {
    std::vector<float> made(size_t(count), 0.0f);
    for (float& each : made) each = float(upto(8)) - 4.0f;
    return made;
  };
  const std::vector<float> left = whole(m * steps), other = whole(n * steps);
  const std::vector<float>& right = alone ? left : other;
  const auto lies = [&](const std::vector<float>& numbers, int64_t lines, bool by_line) {
    return Factor{numbers.data(), lines, by_line ? steps : 1, by_line ? 1 : lines};
  };
  const float keep = float(upto(2));
  std::vector<float> total(size_t((m - 1) * stride + n), keep == 0 ? std::nanf("") : 3.0f);
  const std::vector<float> before = total;
  Sum job{lies(left, m, left_by_line), lies(right, n, right_by_line), steps, keep, 0.5f, total.data(), stride, half, nullptr};
  const int64_t bytes = qtr_sums_scratch(path, &job), guard = 4096;
  std::vector<char> scratch(size_t(bytes + guard + 64), 77);
  job.scratch = scratch.data() + (64 - uintptr_t(scratch.data()) % 64) % 64;
  qtr_sum(path, &job);
  for (int64_t i = 0; i < guard; ++i) expect(job.scratch[bytes + i] == 77);
  const auto number = [&](const std::vector<float>& numbers, int64_t lines, bool by_line, int64_t line, int64_t step) {
    return numbers[size_t(by_line ? line * steps + step : step * lines + line)];
  };
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < stride && i * stride + j < int64_t(total.size()); ++j) {
      const float found = total[size_t(i * stride + j)], held = before[size_t(i * stride + j)];
      float sum = 0.0f;
      for (int64_t step = 0; j < n && step < steps; ++step)
        sum += number(left, m, left_by_line, i, step) * number(right, n, right_by_line, j, step);
      const bool same = found == held || (std::isnan(found) && std::isnan(held));
      if (j >= n || (half == LOWER && j > i)) expect(same);
      else {
        const float wanted = (keep == 0 ? 0.0f : keep * held) + 0.5f * sum;  // 12 bits hold no 4 exactly where 2047 is the largest
        expect(std::fabs(found - wanted) <= 1e-3f * float(steps) || (half == UPPER && j < i && same));
      }
    }
}

using Memory = std::unique_ptr<char, decltype(&std::free)>;

Memory aligned(int64_t bytes) {
  expect(bytes % 64 == 0);
  return {static_cast<char*>(std::aligned_alloc(64, size_t(bytes))), &std::free};
}

// Both kinds of sweeps over a matrix that is nearly diagonal; what they read and write has exactly the size that they say.
void run_sweep(int path) {
  const int64_t n = 1 + upto(150), k = 1 + upto(300), ahead = upto(1), block = int64_t(32) << upto(2);
  const bool grouped = k % block == 0;
  const int64_t groups = grouped ? k / block : 1;
  std::vector<float> matrix = numbers(k * k), rows = numbers(n * k), steps(size_t(n * groups), 0.25f);
  for (float& each : matrix) each *= 0.001f;
  for (int64_t i = 0; i < k; ++i) matrix[size_t(i * k + i)] = 1.0f;
  std::vector<float> bend(size_t(k), 0.0f), corners(size_t((k + block - 1) / block * block * block), 0.0f);
  Swept swept{{matrix.data(), k, ahead ? 1 : k, ahead ? k : 1}, block, ahead, bend.data(), corners.data(), nullptr};
  const Memory words = aligned(qtr_sweep_bytes(&swept));
  swept.words = words.get();
  qtr_sweep_pack(&swept);
  std::vector<float>().swap(matrix);
  std::vector<int64_t> group(size_t(k), 0);
  for (int64_t i = 0; i < k; ++i) group[size_t(i)] = i * groups / k;
  std::vector<int8_t> codes(size_t(n * k), 3);
  std::vector<float> before(size_t(n * k), 0.0f), after(size_t(n * k), 0.0f);
  const bool slopes = !ahead && upto(1);
  const int64_t visits = slopes ? upto(2) : 1 + upto(1);  // of none there is only what comes before
  Sweep job{&swept, rows.data(), steps.data(), group.data(), n, visits ? groups : 0, -8.0f, 7.0f, visits, codes.data(),
            slopes ? before.data() : nullptr, slopes && visits ? after.data() : nullptr, nullptr};
  const Memory scratch = aligned(qtr_sweep_scratch(&job));
  job.scratch = scratch.get();
  qtr_sweep(path, &job);
  for (int64_t i = 0; i < n * k; ++i) {
    expect(codes[size_t(i)] >= -8 && codes[size_t(i)] <= 7);
    if (ahead) expect(std::fabs(float(codes[size_t(i)]) * 0.25f - rows[size_t(i)]) < 0.25f);
    if (slopes) expect(std::fabs(before[size_t(i)] - rows[size_t(i)]) < 0.2f && std::fabs(after[size_t(i)]) < 0.4f);
  }
}

}  // namespace

int main() {
  int runs = 0;
  for (int path = 0; qtr_path_name(path); ++path)
    for (int i = 0; qtr_path_supported(path) && i < 50; ++i, ++runs) {
      run(path);
      run_grid(path);
      run_layer(path);
    }
  for (int path = 0; qtr_sums_name(path); ++path)
    for (int i = 0; qtr_sums_supported(path) && i < 50; ++i) run_sum(path);
  for (int path = 0; qtr_path_name(path); ++path)
    for (int i = 0; qtr_sweeps_supported() && qtr_path_supported(path) && i < 50; ++i) run_sweep(path);
  std::printf("%d runs\n", runs);
}
