// The library's C face: the paths this CPU has, and one call each for binary and sparse layers.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <vector>
#include "../threads.h"
#include "job.h"
#include "planes.h"

namespace {

constexpr int64_t BLOCK_BYTES = 4 << 20;   // of laid out inputs at a time: stays in L2 and L3
constexpr int64_t TOKENS = 256;            // rows of a linear layer at a time, for the same reason
constexpr int64_t SERIAL_WORK = 1 << 16;   // vector operations; below, waking threads costs more than it saves

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool always() { return true; }

// Best first. A compiler that does not know an instruction set leaves its paths out.
struct Choice {
  VisionPath path;
  bool (*supported)();
};
std::vector<Choice> make_choices() {
  __builtin_cpu_init();  // these tests include whether the operating system saves the wide registers
  std::vector<Choice> all;
  const BinaryPath* narrow = &PORTABLE_BINARY;
#if !defined(WITHOUT_BINARY_AVX2) && !defined(WITHOUT_SPARSE_AVX2)
  if (has_avx2()) narrow = &AVX2_BINARY;
#endif
#if !defined(WITHOUT_SPARSE_AVX512)
  const BinaryPath* wide = narrow;  // AVX512 without population counts: byte tables in 256 bits
#if !defined(WITHOUT_BINARY_AVX512)
  if (__builtin_cpu_supports("avx512vpopcntdq")) wide = &AVX512_BINARY;
#endif
  all.push_back({{"avx512", wide, &AVX512_SPARSE}, has_avx512});
#endif
#if !defined(WITHOUT_BINARY_AVX2) && !defined(WITHOUT_SPARSE_AVX2)
  all.push_back({{"avx2", &AVX2_BINARY, &AVX2_SPARSE}, has_avx2});
#endif
  all.push_back({{"portable", &PORTABLE_BINARY, &PORTABLE_SPARSE}, always});
  return all;
}
#else
struct Choice {
  VisionPath path;
  bool (*supported)();
};
std::vector<Choice> make_choices() { return {{{"portable", &PORTABLE_BINARY, &PORTABLE_SPARSE}, [] { return true; }}}; }
#endif

const std::vector<Choice>& choices() {
  static const std::vector<Choice> made = make_choices();
  return made;
}

const VisionPath& path_of(int number) { return choices()[size_t(number)].path; }

int64_t up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

struct Scratch {
  std::unique_ptr<char, void (*)(void*)> memory{nullptr, std::free};
  int64_t size = 0;

  char* take(int64_t bytes) {
    if (bytes > size) {
      memory.reset(static_cast<char*>(std::aligned_alloc(64, size_t(up(bytes, 4096)))));
      size = memory ? up(bytes, 4096) : 0;
    }
    return memory.get();
  }
};
thread_local Scratch scratch;

// A fixed set of tasks that threads take one by one.
struct Tasks {
  std::atomic<int64_t> next{0};
  int64_t count = 0;

  template <class Work>
  void run(Work&& work) {
    for (int64_t task; (task = next++) < count;) work(task);
  }
};

int threads_for(int64_t work) { return work < SERIAL_WORK ? 1 : max_threads(); }

// Channels a task takes: all of them unless there are too few tasks for every thread; a multiple of `unit`.
int64_t chunk_of(int64_t channels, int64_t unit, int64_t other_tasks, int threads) {
  const int64_t wanted = threads == 1 ? 1 : (4 * threads + other_tasks - 1) / other_tasks;
  return std::max(unit, up((channels + wanted - 1) / wanted, unit));
}

int64_t images_a_block(const Planes& planes, int64_t element_bytes) {
  return std::max<int64_t>(1, std::min(planes.c.images, BLOCK_BYTES / std::max<int64_t>(1, planes.image * element_bytes)));
}

// For every (class of output rows, channel, output column): what a sum starts at. Padded taps hold 0 bits and add
// nothing in the float layer: each is left out of the length, and where its weight bit is 1 it is counted as a
// mismatch that starting two higher undoes. Rows that leave out the same kernel rows share a class.
struct Starts {
  std::vector<int64_t> class_of;           // [out_h]
  std::vector<std::vector<bool>> rows, columns;  // valid kernel rows of a class; kernel columns of an output column
  std::vector<int32_t> values;             // [classes, n, out_w]

  explicit Starts(const Planes& p) {
    for (int64_t y = 0; y < p.out_h; ++y) {
      const auto valid = inside(y * p.c.stride_y - p.c.pad_y, p.c.kernel_y, p.c.dilation_y, p.c.height);
      const auto found = std::find(rows.begin(), rows.end(), valid);
      class_of.push_back(found - rows.begin());
      if (found == rows.end()) rows.push_back(valid);
    }
    for (int64_t x = 0; x < p.out_w; ++x)
      columns.push_back(inside(x * p.c.stride_x - p.c.pad_x, p.c.kernel_x, p.c.dilation_x, p.c.width));
    values.resize(rows.size() * size_t(p.c.n * p.out_w));
  }

  void fill(const Planes& p, const int32_t* ones, int64_t channel) {  // ones: [n, taps], weight bits that are 1
    for (size_t k = 0; k < rows.size(); ++k) {
      int32_t* to = values.data() + (int64_t(k) * p.c.n + channel) * p.out_w;
      for (int64_t x = 0; x < p.out_w; ++x) {
        int32_t start = 0;
        if (x && columns[size_t(x)] == columns[size_t(x - 1)]) {
          to[x] = to[x - 1];
          continue;
        }
        for (int64_t tap = 0; tap < p.taps(); ++tap) {
          const bool valid = rows[k][size_t(tap / p.c.kernel_x)] && columns[size_t(x)][size_t(tap % p.c.kernel_x)];
          start += valid ? int32_t(p.c.channels) : 2 * ones[channel * p.taps() + tap];
        }
        to[x] = start;
      }
    }
  }

 private:
  static std::vector<bool> inside(int64_t first, int64_t taps, int64_t dilation, int64_t size) {
    std::vector<bool> valid;
    for (int64_t t = 0; t < taps; ++t) valid.push_back(first + t * dilation >= 0 && first + t * dilation < size);
    return valid;
  }
};

// Call work(oy, ox, lane, count) for the stretches of output rows inside positions [first, first + count).
template <class Work>
void by_rows(const Planes& p, int64_t first, int64_t count, Work&& work) {
  for (int64_t y = first / p.row; y < p.out_h && y * p.row < first + count; ++y) {
    const int64_t begin = std::max(first, y * p.row), end = std::min(first + count, y * p.row + p.out_w);
    if (begin < end) work(y, begin - y * p.row, begin - first, end - begin);
  }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

const char* qtv_path_name(int path) {
  return path >= 0 && size_t(path) < choices().size() ? path_of(path).name : nullptr;
}

int qtv_path_supported(int path) {
  return path >= 0 && size_t(path) < choices().size() && choices()[size_t(path)].supported();
}

// Tell whether the path counts bits with an instruction made for it.
int qtv_counts_bits(int path) {
#if defined(__x86_64__) && !defined(WITHOUT_BINARY_AVX512)
  return path_of(path).binary == &AVX512_BINARY;
#else
  return path < 0;
#endif
}

// y [images, n, out_h, out_w] of x [images, channels, height, width], both float32 and contiguous.
// weight: [n, taps, ceil(channels / 32)] words; ones: [n, taps]; scale: [n]; bias: [n] or null; thresholds: [n] or null.
// Returns 0, or 1 when memory is short.
int qtv_binary_conv(int path, const float* x, const Convolution* convolution, const uint32_t* weight,
                    const int32_t* ones, const float* scale, const float* bias, const int32_t* thresholds, float* y) {
  const BinaryPath& own = *path_of(path).binary;
  const Convolution& c = *convolution;
  const Planes p(c, up(c.channels, WORD) / WORD);
  const std::vector<int32_t> offsets = p.offsets();
  const int64_t words = int64_t(offsets.size()), block = images_a_block(p, 4), pixels = c.height * c.width;
  const int64_t tiles = up(p.positions, BINARY_LANES) / BINARY_LANES;
  const int threads = threads_for(c.images * c.n * p.positions * words / 16 + c.images * c.channels * pixels / 16);
  uint32_t* laid = reinterpret_cast<uint32_t*>(scratch.take((block * p.image + BINARY_LANES + threads * up(pixels, 64)) * 4));
  if (!laid) return 1;
  uint32_t* packed = laid + block * p.image + BINARY_LANES;
  Starts starts(p);
  for (int64_t first = 0; first < c.images; first += block) {
    const int64_t images = std::min(block, c.images - first);
    const int64_t chunk = chunk_of(c.n, BINARY_ROWS, images * tiles, threads), chunks = up(c.n, chunk) / chunk;
    Tasks pack, begin, multiply;
    pack.count = images * p.planes, begin.count = first ? 0 : c.n, multiply.count = images * tiles * chunks;
    auto body = [&](int thread, int given) {
      uint32_t* words_of_pixels = packed + thread * up(pixels, 64);
      pack.run([&](int64_t task) {
        const int64_t image = task / p.planes, plane = task % p.planes;
        const float* from = x + ((first + image) * c.channels + plane * WORD) * pixels;
        own.pack_pixels(from, pixels, std::min(WORD, c.channels - plane * WORD), pixels, words_of_pixels);
        p.place(words_of_pixels, laid + image * p.image, plane);
      });
      begin.run([&](int64_t channel) { starts.fill(p, ones, channel); });
      barrier(given);
      multiply.run([&](int64_t task) {
        const int64_t image = task / (tiles * chunks), tile = task / chunks % tiles, part = task % chunks;
        int32_t counts[BINARY_ROWS * BINARY_LANES];
        BinaryTile job{};
        const int64_t position = tile * BINARY_LANES;
        job.lanes = laid + image * p.image + position;
        job.lane_count = std::min(BINARY_LANES, p.positions - position);
        job.offsets = offsets.data(), job.words = words, job.row_stride = words, job.counts = counts;
        for (int64_t n = part * chunk; n < std::min(c.n, (part + 1) * chunk); n += BINARY_ROWS) {
          job.rows = weight + n * words;
          job.row_count = int(std::min<int64_t>(BINARY_ROWS, c.n - n));
          own.count(job);
          for (int r = 0; r < job.row_count; ++r)
            by_rows(p, position, job.lane_count, [&](int64_t oy, int64_t ox, int64_t lane, int64_t count) {
              const int32_t* from = starts.values.data() + (starts.class_of[size_t(oy)] * c.n + n + r) * p.out_w + ox;
              float* to = y + (((first + image) * c.n + n + r) * p.out_h + oy) * p.out_w + ox;
              own.finish_places(counts + r * BINARY_LANES + lane, from, count, scale[n + r], bias ? bias + n + r : nullptr,
                                thresholds ? thresholds + n + r : nullptr, to);
            });
        }
      });
    };
    parallel(threads, body);
  }
  return 0;
}

// y [m, n] of x [m, k], rows x_stride apart. weight: [ceil(n / 64), ceil(k / 32), 64] words, zeros after the last
// output. The rest as for the convolution.
int qtv_binary_linear(int path, const float* x, int64_t x_stride, int64_t m, int64_t k, int64_t n, const uint32_t* weight,
                      const float* scale, const float* bias, const int32_t* thresholds, float* y) {
  const BinaryPath& own = *path_of(path).binary;
  const int64_t words = up(k, WORD) / WORD, panels = up(n, BINARY_LANES) / BINARY_LANES;
  std::vector<int32_t> offsets;
  for (int64_t i = 0; i < words; ++i) offsets.push_back(int32_t(i * BINARY_LANES));
  uint32_t* rows = reinterpret_cast<uint32_t*>(scratch.take(std::min(m, TOKENS) * words * 4));
  if (!rows && m && words) return 1;
  const int threads = threads_for(m * n * words / 16 + m * words * 4);
  for (int64_t first = 0; first < m; first += TOKENS) {
    const int64_t block = std::min(TOKENS, m - first);
    const int64_t chunk = chunk_of(block, BINARY_ROWS, panels, threads), chunks = up(block, chunk) / chunk;
    Tasks pack, multiply;
    pack.count = block, multiply.count = panels * chunks;
    auto body = [&](int, int given) {
      pack.run([&](int64_t row) { own.pack_row(x + (first + row) * x_stride, k, rows + row * words); });
      barrier(given);
      multiply.run([&](int64_t task) {
        const int64_t panel = task / chunks, part = task % chunks, channel = panel * BINARY_LANES;
        int32_t counts[BINARY_ROWS * BINARY_LANES];
        BinaryTile job{};
        job.lanes = weight + panel * words * BINARY_LANES;
        job.lane_count = std::min(BINARY_LANES, n - channel);
        job.offsets = offsets.data(), job.words = words, job.row_stride = words, job.counts = counts;
        for (int64_t row = part * chunk; row < std::min(block, (part + 1) * chunk); row += BINARY_ROWS) {
          job.rows = rows + row * words;
          job.row_count = int(std::min<int64_t>(BINARY_ROWS, block - row));
          own.count(job);
          for (int r = 0; r < job.row_count; ++r)
            own.finish_channels(counts + r * BINARY_LANES, int32_t(k), job.lane_count, scale + channel,
                                bias ? bias + channel : nullptr, thresholds ? thresholds + channel : nullptr,
                                y + (first + row + r) * n + channel);
        }
      });
    };
    parallel(threads, body);
  }
  return 0;
}

// y [images, n, out_h, out_w] of x, as for binary layers. values: [groups, length, rows], groups * rows = n; columns:
// [groups, length], entries of a kernel-major weight row.
int qtv_sparse_conv(int path, const float* x, const Convolution* convolution, const float* values,
                    const int32_t* columns, int64_t length, int rows, int64_t segment, const float* bias, float* y) {
  const SparsePath& own = *path_of(path).sparse;
  const Convolution& c = *convolution;
  const Planes p(c, c.channels);
  const std::vector<int32_t> offsets = p.offsets();
  const int64_t block = images_a_block(p, 4), lanes = own.tile_lanes(rows), groups = c.n / rows;
  const int64_t tiles = up(p.positions, lanes) / lanes;
  const int threads = threads_for(c.images * c.n * p.positions * length / 16);
  const int64_t chunk = chunk_of(groups, 1, std::min(block, c.images) * tiles, threads), chunks = up(groups, chunk) / chunk;
  const int64_t own_sums = chunk * rows * SPARSE_LANES;
  float* laid = reinterpret_cast<float*>(scratch.take((up(block * p.image + SPARSE_LANES, 16) + threads * own_sums) * 4));
  if (!laid) return 1;
  float* sums = laid + up(block * p.image + SPARSE_LANES, 16);
  for (int64_t first = 0; first < c.images; first += block) {
    const int64_t images = std::min(block, c.images - first);
    Tasks pack, multiply;
    pack.count = images * c.channels, multiply.count = images * tiles * chunks;
    auto body = [&](int thread, int given) {
      pack.run([&](int64_t task) {
        const int64_t image = task / c.channels, channel = task % c.channels;
        p.place(x + ((first + image) * c.channels + channel) * c.height * c.width, laid + image * p.image, channel);
      });
      barrier(given);
      multiply.run([&](int64_t task) {
        const int64_t image = task / (tiles * chunks), position = task / chunks % tiles * lanes;
        const int64_t begin = task % chunks * chunk, end = std::min(groups, begin + chunk);
        float* mine = sums + thread * own_sums;
        const int64_t count = std::min(lanes, p.positions - position);
        own.multiply({laid + image * p.image + position, offsets.data(), columns, values, length, segment, rows, begin, end,
                      count, mine});
        for (int64_t n = begin * rows; n < end * rows; ++n)
          by_rows(p, position, count, [&](int64_t oy, int64_t ox, int64_t lane, int64_t places) {
            const float* from = mine + (n - begin * rows) * SPARSE_LANES + lane;
            float* to = y + (((first + image) * c.n + n) * p.out_h + oy) * p.out_w + ox;
            const float b = bias ? bias[n] : 0.0f;
            for (int64_t i = 0; i < places; ++i) to[i] = from[i] + b;
          });
      });
    };
    parallel(threads, body);
  }
  return 0;
}

// y [m, n] of x [m, k], rows x_stride apart: positions are tokens, so x is laid out with its inputs as planes.
int qtv_sparse_linear(int path, const float* x, int64_t x_stride, int64_t m, int64_t k, int64_t n, const float* values,
                      const int32_t* columns, int64_t length, int rows, int64_t segment, const float* bias, float* y) {
  const SparsePath& own = *path_of(path).sparse;
  const int64_t lanes = own.tile_lanes(rows), groups = n / rows, width = up(std::min(m, TOKENS), lanes);
  std::vector<int32_t> offsets;
  for (int64_t i = 0; i < k; ++i) offsets.push_back(int32_t(i * width));
  const int threads = threads_for(up(m, 16) * n * length / 16);
  const int64_t chunk = chunk_of(groups, up(16, rows) / rows, width / lanes, threads), chunks = up(groups, chunk) / chunk;
  const int64_t own_sums = chunk * rows * SPARSE_LANES;
  float* laid = reinterpret_cast<float*>(scratch.take((up(k * width, 16) + threads * own_sums) * 4));
  if (!laid && m && k) return 1;
  float* sums = laid + up(k * width, 16);
  constexpr int64_t SQUARE = 16;  // transposed at a time
  for (int64_t first = 0; first < m; first += TOKENS) {
    const int64_t block = std::min(TOKENS, m - first), tiles = up(block, lanes) / lanes;
    Tasks pack, multiply;
    pack.count = up(width, SQUARE) / SQUARE, multiply.count = tiles * chunks;
    auto body = [&](int thread, int given) {
      pack.run([&](int64_t task) {
        const int64_t begin = task * SQUARE, end = std::min(width, begin + SQUARE), real = std::min(end, block);
        for (int64_t i = 0; i < k; ++i) {
          float* to = laid + i * width;
          for (int64_t t = begin; t < real; ++t) to[t] = x[(first + t) * x_stride + i];
          for (int64_t t = std::max(begin, real); t < end; ++t) to[t] = 0.0f;
        }
      });
      barrier(given);
      multiply.run([&](int64_t task) {
        const int64_t position = task / chunks * lanes, begin = task % chunks * chunk;
        const int64_t end = std::min(groups, begin + chunk), count = std::min(lanes, block - position);
        float* mine = sums + thread * own_sums;
        own.multiply({laid + position, offsets.data(), columns, values, length, segment, rows, begin, end, count, mine});
        for (int64_t t = 0; t < count; ++t) {
          float* to = y + (first + position + t) * n;
          for (int64_t i = begin * rows; i < end * rows; ++i)
            to[i] = mine[(i - begin * rows) * SPARSE_LANES + t] + (bias ? bias[i] : 0.0f);
        }
      });
    };
    parallel(threads, body);
  }
  return 0;
}

// What all threads together reach from registers, a second: bits compared (binary) or float operations (sparse).
double qtv_peak(int path, int sparse, int64_t rounds) {
  const VisionPath& own = path_of(path);
  std::atomic<double> done{0};
  auto body = [&](int, int) {
    const double part = sparse ? own.sparse->peak(rounds) : own.binary->peak(rounds);
    for (double before = done; !done.compare_exchange_weak(before, before + part);) {}
  };
  const auto start = std::chrono::steady_clock::now();
  parallel(max_threads(), body);
  return done / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}
#pragma GCC visibility pop
