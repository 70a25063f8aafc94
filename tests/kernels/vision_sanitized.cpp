// Runs every code path of the vision kernels on random layers whose buffers end where the next page may not be touched.
//
// Compiled with AddressSanitizer and UndefinedBehaviorSanitizer. Binary results must be the same bits on every path,
// sparse ones close; and no result may be left out (outputs start as NaN).
#include <sys/mman.h>
#include <unistd.h>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>
#include "planes.h"

extern "C" {
const char* qtv_path_name(int path);
int qtv_path_supported(int path);
int qtv_binary_conv(int path, const float* x, const Convolution* convolution, const uint32_t* weight,
                    const int32_t* ones, const float* scale, const float* bias, const int32_t* thresholds, float* y);
int qtv_binary_linear(int path, const float* x, int64_t x_stride, int64_t m, int64_t k, int64_t n,
                      const uint32_t* weight, const float* scale, const float* bias, const int32_t* thresholds,
                      float* y);
int qtv_sparse_conv(int path, const float* x, const Convolution* convolution, const float* values,
                    const int32_t* columns, int64_t windows, int64_t length, int rows, const float* bias, float* y);
int qtv_sparse_linear(int path, const float* x, int64_t x_stride, int64_t m, int64_t k, int64_t n, const float* values,
                      const int32_t* columns, int64_t windows, int64_t length, int rows, const float* bias, float* y);
}

namespace {

std::mt19937 random_bits(1);
int64_t upto(int64_t most) { return int64_t(random_bits() % uint64_t(most + 1)); }

template <class T>
struct Guarded {  // `count` numbers that end at a page nobody may touch
  char* map;
  size_t whole;
  T* data;
  int64_t count;

  explicit Guarded(int64_t numbers) : count(numbers) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), bytes = size_t(numbers) * sizeof(T);
    whole = (bytes + page - 1) / page * page + page;
    map = static_cast<char*>(mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (map == MAP_FAILED || mprotect(map + whole - page, page, PROT_NONE)) std::abort();
    data = reinterpret_cast<T*>(map + whole - page - bytes);
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(map, whole); }

  template <class Make>
  void fill(Make make) {
    for (int64_t i = 0; i < count; ++i) data[i] = T(make());
  }
};

float number() { return float(int64_t(random_bits() % 2001) - 1000) * 0.001f; }

// Run `call(path, y)` on every path; `bound` is how far results may be apart.
template <class Call>
int compare(const char* what, int64_t outputs, float bound, Call call) {
  std::vector<float> first;
  int runs = 0;
  for (int path = 0; qtv_path_name(path); ++path) {
    if (!qtv_path_supported(path)) continue;
    Guarded<float> y(outputs);
    y.fill([] { return std::numeric_limits<float>::quiet_NaN(); });
    if (call(path, y.data)) std::exit(1);
    if (first.empty()) first.assign(y.data, y.data + outputs);
    for (int64_t i = 0; i < outputs; ++i)
      if (!(std::fabs(y.data[i] - first[size_t(i)]) <= bound)) {
        std::printf("%s: path %s gives %g, not %g\n", what, qtv_path_name(path), y.data[i], first[size_t(i)]);
        std::exit(1);
      }
    ++runs;
  }
  return runs;
}

}  // namespace

int main() {
  int runs = 0;
  for (int round = 0; round < 120; ++round) {
    const int rows = 1 + int(upto(3));
    const int64_t windows = rows == 1 ? 1 + upto(2) : 1;
    Convolution c{};
    c.images = upto(2), c.channels = (1 + upto(40)) * windows, c.n = (1 + upto(8)) * rows;
    c.kernel_y = 1 + upto(2), c.kernel_x = 1 + upto(3), c.stride_y = 1 + upto(2), c.stride_x = 1 + upto(2);
    c.pad_y = upto(2), c.pad_x = upto(2), c.dilation_y = 1 + upto(1), c.dilation_x = 1 + upto(1);
    c.height = c.dilation_y * (c.kernel_y - 1) + 1 + upto(12), c.width = c.dilation_x * (c.kernel_x - 1) + 1 + upto(20);
    const Planes p(c, c.channels);
    const int64_t taps = p.taps(), k = taps * c.channels, words = (c.channels + 31) / 32;
    const int64_t outputs = c.images * c.n * p.out_h * p.out_w, m = upto(round % 10 ? 9 : 300), stride = k + upto(3);
    Guarded<float> x(c.images * c.channels * c.height * c.width), rows_x(m ? (m - 1) * stride + k : 0);
    Guarded<float> scale(c.n), bias(c.n);
    Guarded<int32_t> thresholds(c.n), ones(c.n * taps);
    Guarded<uint32_t> weight(c.n * taps * words), panels((c.n + 63) / 64 * ((k + 31) / 32) * 64);
    for (auto* floats : {&x, &rows_x, &scale, &bias}) floats->fill(number);
    thresholds.fill([] { return upto(20) - 10; });
    ones.fill([] { return upto(5); });
    for (auto* bits : {&weight, &panels}) bits->fill(random_bits);
    const float* own_bias = round % 2 ? bias.data : nullptr;
    const int32_t* own_thresholds = round % 5 ? nullptr : thresholds.data;
    runs += compare("binary convolution", outputs, 0, [&](int path, float* y) {
      return qtv_binary_conv(path, x.data, &c, weight.data, ones.data, scale.data, own_bias, own_thresholds, y);
    });
    runs += compare("binary linear", m * c.n, 0, [&](int path, float* y) {
      return qtv_binary_linear(path, rows_x.data, stride, m, k, c.n, panels.data, scale.data, own_bias, own_thresholds, y);
    });
    const int64_t window = k / windows, length = upto(window), groups = c.n / rows;
    Guarded<float> values(windows * groups * length * rows);
    Guarded<int32_t> columns(windows * groups * length);
    values.fill(number);
    for (int64_t i = 0; i < columns.count; ++i)
      columns.data[i] = int32_t(i / (groups * length) * window + upto(window - 1));
    runs += compare("sparse convolution", outputs, 1e-3f, [&](int path, float* y) {
      return qtv_sparse_conv(path, x.data, &c, values.data, columns.data, windows, length, rows, own_bias, y);
    });
    runs += compare("sparse linear", m * c.n, 1e-3f, [&](int path, float* y) {
      return qtv_sparse_linear(path, rows_x.data, stride, m, k, c.n, values.data, columns.data, windows, length, rows,
                               own_bias, y);
    });
  }
  std::printf("%d runs\n", runs);
}
