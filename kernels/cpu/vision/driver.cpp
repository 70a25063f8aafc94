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
  const int64_t fit = BLOCK_BYTES / std::max<int64_t>(1, planes.image * element_bytes);
  return std::max<int64_t>(1, std::min(planes.c.images, fit));
}

// Output rows (or columns) by which of their kernel rows (columns) lie inside the image: one mask for each kind.
struct Edges {
  std::vector<std::vector<char>> kinds;  // [kinds, taps of this axis]
  std::vector<int64_t> kind_of;          // [outputs], ascending stretches of equal kinds

  Edges(int64_t outputs, int64_t taps, int64_t stride, int64_t pad, int64_t dilation, int64_t size) {
    std::vector<char> valid(static_cast<size_t>(taps));
    for (int64_t i = 0; i < outputs; ++i) {
      for (int64_t t = 0; t < taps; ++t) {
        const int64_t at = i * stride - pad + t * dilation;
        valid[size_t(t)] = at >= 0 && at < size;
      }
      kind_of.push_back(std::find(kinds.begin(), kinds.end(), valid) - kinds.begin());
      if (kind_of.back() == int64_t(kinds.size())) kinds.push_back(valid);
    }
  }
};

// For every kind of output row, channel and output column: what a sum starts at. Padded taps hold 0 bits and add
// nothing in the float layer: each is left out of the length, and where its weight bit is 1 it is counted as a
// mismatch that starting two higher undoes.
struct Starts {
  Edges rows, columns;
  std::vector<int32_t> values;  // [kinds of rows, n, out_w]

  explicit Starts(const Planes& p)
      : rows(p.out_h, p.c.kernel_y, p.c.stride_y, p.c.pad_y, p.c.dilation_y, p.c.height),
        columns(p.out_w, p.c.kernel_x, p.c.stride_x, p.c.pad_x, p.c.dilation_x, p.c.width),
        values(rows.kinds.size() * size_t(p.c.n * p.out_w)) {}

  void fill(const Planes& p, const int32_t* ones, int64_t channel) {  // ones: [n, taps], weight bits that are 1
    std::vector<int32_t> by_column(columns.kinds.size());
    for (size_t kind = 0; kind < rows.kinds.size(); ++kind) {
      for (size_t column = 0; column < columns.kinds.size(); ++column) {
        int32_t start = 0;
        for (int64_t ky = 0; ky < p.c.kernel_y; ++ky)
          for (int64_t kx = 0; kx < p.c.kernel_x; ++kx)
            start += rows.kinds[kind][size_t(ky)] && columns.kinds[column][size_t(kx)]
                         ? int32_t(p.c.channels)
                         : 2 * ones[channel * p.taps() + ky * p.c.kernel_x + kx];
        by_column[column] = start;
      }
      int32_t* to = values.data() + (int64_t(kind) * p.c.n + channel) * p.out_w;
      for (int64_t x = 0; x < p.out_w; ++x) to[x] = by_column[size_t(columns.kind_of[size_t(x)])];
    }
  }
};

// Where the lanes [first, first + count) belong; `starts` of a binary layer or null.
std::vector<Stretch> stretches(const Planes& p, int64_t first, int64_t count, const Starts* starts) {
  std::vector<Stretch> all;
  for (int64_t y = first / p.row; y < p.out_h && y * p.row < first + count; ++y) {
    const int64_t begin = std::max(first, y * p.row), end = std::min(first + count, y * p.row + p.out_w);
    const int64_t x = begin - y * p.row;
    if (begin < end)
      all.push_back({begin - first, end - begin, y * p.out_w + x,
                     starts ? starts->rows.kind_of[size_t(y)] * p.c.n * p.out_w + x : 0});
  }
  return all;
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
// weight: [n, taps, ceil(channels / 32)] words; ones: [n, taps]; scale: [n]; bias and thresholds: [n] or null.
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
  const int64_t needed = block * p.image + BINARY_LANES + threads * up(pixels, 64);
  uint32_t* laid = reinterpret_cast<uint32_t*>(scratch.take(needed * 4));
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
        const std::vector<Stretch> rows = stretches(p, position, job.lane_count, &starts);
        for (int64_t n = part * chunk; n < std::min(c.n, (part + 1) * chunk); n += BINARY_ROWS) {
          job.rows = weight + n * words;
          job.row_count = int(std::min<int64_t>(BINARY_ROWS, c.n - n));
          own.count(job);
          for (int r = 0; r < job.row_count; ++r)
            own.finish_places(counts + r * BINARY_LANES, rows.data(), int64_t(rows.size()),
                              starts.values.data() + (n + r) * p.out_w, scale[n + r], bias ? bias + n + r : nullptr,
                              thresholds ? thresholds + n + r : nullptr,
                              y + ((first + image) * c.n + n + r) * p.out_h * p.out_w);
        }
      });
    };
    parallel(threads, body);
  }
  return 0;
}

// y [m, n] of x [m, k], rows x_stride apart. weight: [ceil(n / 64), ceil(k / 32), 64] words, zeros after the last
// output. The rest as for the convolution.
int qtv_binary_linear(int path, const float* x, int64_t x_stride, int64_t m, int64_t k, int64_t n,
                      const uint32_t* weight, const float* scale, const float* bias,
                      const int32_t* thresholds, float* y) {
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

// y [images, n, out_h, out_w] of x, as for binary layers. values: [windows, groups, length, rows], groups * rows = n;
// columns: [windows, groups, length], entries of a kernel-major weight row, inside their window of it.
int qtv_sparse_conv(int path, const float* x, const Convolution* convolution, const float* values,
                    const int32_t* columns, int64_t windows, int64_t length, int rows, const float* bias, float* y) {
  const SparsePath& own = *path_of(path).sparse;
  const Convolution& c = *convolution;
  const Planes p(c, c.channels);
  const std::vector<int32_t> offsets = p.offsets();
  const int64_t block = images_a_block(p, 4), lanes = own.tile_lanes(rows), groups = c.n / rows;
  const int64_t tiles = up(p.positions, lanes) / lanes, k = int64_t(offsets.size());
  const int threads = threads_for(c.images * c.n * p.positions * windows * length / 16);
  const int64_t chunk = chunk_of(groups, 1, std::min(block, c.images) * tiles, threads);
  const int64_t chunks = up(groups, chunk) / chunk;
  const int64_t own_sums = chunk * rows * SPARSE_LANES, near = k / windows * SPARSE_LANES;
  const int64_t inputs = up(block * p.image + SPARSE_LANES, 16);
  float* laid = reinterpret_cast<float*>(scratch.take((inputs + threads * (own_sums + near)) * 4));
  if (!laid) return 1;
  float* sums = laid + inputs;
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
        float* mine = sums + thread * (own_sums + near);
        const int64_t count = std::min(lanes, p.positions - position);
        own.multiply({laid + image * p.image + position, offsets.data(), columns, values, windows, k / windows, groups,
                      length, rows, begin, end, count, mine, mine + own_sums});
        const std::vector<Stretch> parts = stretches(p, position, count, nullptr);
        for (int64_t n = begin * rows; n < end * rows; ++n) {
          float* own_row = mine + (n - begin * rows) * SPARSE_LANES;
          if (bias) for (int64_t i = 0; i < SPARSE_LANES; ++i) own_row[i] += bias[n];
          for (const Stretch& s : parts)
            std::memcpy(y + ((first + image) * c.n + n) * p.out_h * p.out_w + s.out, own_row + s.lane,
                        size_t(s.count) * sizeof(float));
        }
      });
    };
    parallel(threads, body);
  }
  return 0;
}

// y [m, n] of x [m, k], rows x_stride apart: positions are tokens, so x is laid out with its inputs as planes.
int qtv_sparse_linear(int path, const float* x, int64_t x_stride, int64_t m, int64_t k, int64_t n, const float* values,
                      const int32_t* columns, int64_t windows, int64_t length, int rows, const float* bias, float* y) {
  const SparsePath& own = *path_of(path).sparse;
  const int64_t lanes = own.tile_lanes(rows), groups = n / rows, width = up(std::min(m, TOKENS), lanes);
  std::vector<int32_t> offsets;
  for (int64_t i = 0; i < k; ++i) offsets.push_back(int32_t(i * width));
  const int threads = threads_for(up(m, 16) * n * windows * length / 16);
  const int64_t chunk = chunk_of(groups, up(16, rows) / rows, width / lanes, threads);
  const int64_t chunks = up(groups, chunk) / chunk;
  const int64_t own_sums = chunk * rows * SPARSE_LANES, near = k / windows * SPARSE_LANES;
  float* laid = reinterpret_cast<float*>(scratch.take((up(k * width, 16) + threads * (own_sums + near)) * 4));
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
        float* mine = sums + thread * (own_sums + near);
        own.multiply({laid + position, offsets.data(), columns, values, windows, k / windows, groups, length, rows,
                      begin, end, count, mine, mine + own_sums});
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
