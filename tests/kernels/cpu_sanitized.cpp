// Runs every code path of the CPU kernels on random layers whose buffers end where the next page may not be touched.
//
// Compiled with AddressSanitizer and UndefinedBehaviorSanitizer. They do not see into the assembly of the AVX512 path;
// the protected page behind each buffer does. Every path must also give the same bits as the portable one.
#include <sys/mman.h>
#include <unistd.h>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

extern "C" {
const char* qtk_path_name(int path);
int qtk_path_supported(int path);
void qtk_pack(const int32_t* packed, int64_t words, int64_t n, int64_t k, uint8_t* out);
int qtk_linear(int path, const void* x, int64_t x_stride, int dtype, int gated, int64_t m, int64_t k, int64_t n,
               int64_t group_size, const void* weight, const void* scales, int scale_dtype, const void* bias,
               int bias_dtype, void* y);
const char* qtk_bfloat16_path_name(int path);
int qtk_bfloat16_path_supported(int path);
void qtk_bfloat16_pack(const void* weight, int64_t n, int64_t k, void* out);
int qtk_bfloat16_survey(const void* weight, int64_t n, int64_t k, uint8_t* tables, int64_t* counts);
int qtk_bfloat16_compress(const void* weight, int64_t n, int64_t k, const uint8_t* tables, const int64_t* starts,
                          uint8_t* out, int64_t* rest);
int qtk_bfloat16_linear(int path, const void* x, int64_t x_stride, int64_t m, int64_t k, int64_t n, const void* weight,
                        const uint8_t* tables, const int64_t* starts, const int64_t* rest, const void* bias, void* y);
}

namespace {

struct Guarded {  // `bytes` that end at a page nobody may touch
  char* map;
  size_t whole;
  char* data;

  explicit Guarded(size_t bytes) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    whole = (bytes + page - 1) / page * page + page;
    map = static_cast<char*>(mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (map == MAP_FAILED || mprotect(map + whole - page, page, PROT_NONE)) std::abort();
    data = map + whole - page - bytes;
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(map, whole); }
};

}  // namespace

int main() {
  std::mt19937 random(1);
  auto upto = [&](int64_t most) { return int64_t(random() % uint64_t(most + 1)); };
  int runs = 0;
  for (int round = 0; round < 150; ++round) {
    const int64_t m = upto(round % 10 ? round % 3 ? 20 : 80 : 530), n = 1 + upto(150), k = 1 + upto(400);
    const int64_t sizes[] = {-1, 32, 64, 128}, group_size = sizes[upto(3)];
    const bool folded = upto(1);
    const int dtype = int(upto(2)), scale_dtype = folded ? 3 : int(upto(1)), bytes = dtype ? 2 : 4;
    const int scale_bytes = folded ? 1 : scale_dtype ? 2 : 4;
    const int64_t groups = group_size < 0 ? 1 : (k + group_size - 1) / group_size;
    const int64_t panels = (n + 63) / 64, steps = (k + 3) / 4, words = (k + 7) / 8;
    const int gated = int(upto(1));
    const int64_t width = gated ? 2 * k : k, stride = width + upto(3);
    Guarded packed(size_t(n * words * 4)), weight(size_t(panels * steps * 128));
    Guarded scales(size_t(panels * (groups + (folded ? 4 : 0)) * 64 * scale_bytes)), bias(size_t(n * bytes));
    Guarded x(size_t((m ? (m - 1) * stride + width : 0) * bytes));
    for (int64_t i = 0; i < n * words * 4; ++i) packed.data[i] = char(random());
    auto fill = [&](Guarded& to, int64_t count, int type) {
      for (int64_t i = 0; i < count; ++i) {
        const float value = float(int64_t(random() % 2001) - 1000) * 0.001f;
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        if (type == 0) std::memcpy(to.data + i * 4, &bits, 4);
        const uint16_t half = type == 1 ? uint16_t(bits >> 16) : uint16_t(random());  // any half, NaN and Inf too
        if (type) std::memcpy(to.data + i * 2, &half, 2);
      }
    };
    if (!folded) fill(scales, panels * groups * 64, scale_dtype);
    for (int64_t panel = 0; folded && panel < panels; ++panel) {  // 64 float32 bases, then multiples
      char* own = scales.data + panel * (groups + 4) * 64;
      for (int64_t i = 0; i < 64 + groups * 64; ++i) {
        const float base = float(upto(1000)) * 0.001f;
        if (i < 64) std::memcpy(own + i * 4, &base, 4);
        else own[192 + i] = char(int64_t(upto(31)) - 15);
      }
    }
    fill(bias, n, dtype);
    fill(x, m ? (m - 1) * stride + width : 0, dtype);
    qtk_pack(reinterpret_cast<int32_t*>(packed.data), words, n, k, reinterpret_cast<uint8_t*>(weight.data));
    std::vector<std::vector<char>> results;
    for (int path = 0; qtk_path_name(path); ++path) {
      if (!qtk_path_supported(path)) continue;
      Guarded y(size_t(m * n * bytes));
      if (qtk_linear(path, x.data, stride, dtype, gated, m, k, n, group_size, weight.data, scales.data, scale_dtype,
                     round % 2 ? bias.data : nullptr, dtype, y.data))
        return 1;
      results.emplace_back(y.data, y.data + m * n * bytes);
      ++runs;
    }
    for (const auto& result : results)
      if (result != results.back()) {
        std::printf("paths differ: m %ld n %ld k %ld group %ld dtype %d\n", long(m), long(n), long(k), long(group_size),
                    dtype);
        return 1;
      }
  }
  for (int round = 0; round < 100; ++round) {  // layers left in bfloat16: no buffer is left, whatever the numbers are
    const int64_t m = upto(round % 10 ? 20 : 110), n = 1 + upto(150), k = upto(400), stride = k + upto(3);
    const int64_t panels = (n + 63) / 64, steps = (k + 1) / 2;
    Guarded matrix(size_t(n * k * 2)), weight(size_t(panels * steps * 256)), bias(size_t(n * 2)), y(size_t(m * n * 2));
    Guarded x(size_t((m ? (m - 1) * stride + k : 0) * 2)), other(size_t(m * n * 2));
    const int any = round % 4 ? 0xf3ff : 0xffff;  // few exponents, or any
    for (int64_t i = 0; i < n * k; ++i) {
      const uint16_t value = uint16_t(random() & (upto(200) ? any : 0xffff));
      std::memcpy(matrix.data + i * 2, &value, 2);
    }
    for (int64_t i = 0; i < (m ? (m - 1) * stride + k : 0) * 2; ++i) x.data[i] = char(random());
    for (int64_t i = 0; i < n * 2; ++i) bias.data[i] = char(random());
    qtk_bfloat16_pack(matrix.data, n, k, weight.data);
    Guarded tables(size_t(panels * 16)), counts(size_t(panels * 8)), starts(size_t((panels + 1) * 8));
    Guarded compressed(size_t(panels * steps * 192));
    int64_t* start = reinterpret_cast<int64_t*>(starts.data);
    uint8_t* table = reinterpret_cast<uint8_t*>(tables.data);
    if (qtk_bfloat16_survey(matrix.data, n, k, table, reinterpret_cast<int64_t*>(counts.data))) return 1;
    for (int64_t i = 0; i < panels; ++i) start[i + 1] = start[i] + reinterpret_cast<int64_t*>(counts.data)[i];
    Guarded rest(size_t(start[panels] * 8));
    int64_t* values = reinterpret_cast<int64_t*>(rest.data);
    if (qtk_bfloat16_compress(matrix.data, n, k, table, start, reinterpret_cast<uint8_t*>(compressed.data), values))
      return 1;
    const void* own_bias = round % 2 ? bias.data : nullptr;
    for (int path = 0; qtk_bfloat16_path_name(path); ++path, ++runs) {
      if (!qtk_bfloat16_path_supported(path)) continue;
      if (qtk_bfloat16_linear(path, x.data, stride, m, k, n, weight.data, nullptr, nullptr, nullptr, own_bias, y.data) ||
          qtk_bfloat16_linear(path, x.data, stride, m, k, n, compressed.data, table, start, values, own_bias, other.data))
        return 1;
      if (std::memcmp(y.data, other.data, size_t(m * n * 2))) {
        std::printf("layouts differ: path %d m %ld n %ld k %ld\n", path, long(m), long(n), long(k));
        return 1;
      }
    }
  }
  std::printf("%d runs\n", runs);
}
