// How an image lies in memory so that a convolution needs no patches: every tap of the kernel is one constant offset.
//
// An image's channel is one plane, padded with zeros and run together: output place (oy, ox) is position
// q = oy * row + ox, and the tap (ky, kx) reads position q + offset(ky, kx). Vector lanes hold consecutive positions
// and need no row ends: the places between rows are computed too and thrown away (2 of 34 columns for a padded 3x3
// kernel on 32x32). With a stride the plane is split by phase (row mod stride, column mod stride), each phase a plane
// of its own, so that lanes stay consecutive:
//
//     stride 1, padding 1, 3x3              stride 2: phase (0, 0)    phase (0, 1)
//     0 0 0 0 0 0                           0 0 0  (rows 0, 2, 4;     0 0 0  (columns 1, 3, 5)
//     0 a b c d 0   q of the tap (1, 2)     0 . .   columns 0, 2, 4)  . . 0
//     0 e f g h 0   = q + 1 * row + 2       0 . .                     . . 0
//     0 0 0 0 0 0
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

struct Convolution {
  int64_t images, channels, height, width, n;
  int64_t kernel_y, kernel_x, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x;
};

struct Planes {
  Convolution c;
  int64_t planes;         // of one phase: channels, or words of 32 channels
  int64_t out_h, out_w;
  int64_t row, size;      // columns and elements of a plane
  int64_t positions;      // lanes that hold results, the thrown away ones between rows included
  int64_t image;          // elements of one image, all phases
  std::vector<int64_t> phases;  // fy * stride_x + fx of those that some tap reads

  Planes(const Convolution& conv, int64_t plane_count) : c(conv), planes(plane_count) {
    out_h = (c.height + 2 * c.pad_y - c.dilation_y * (c.kernel_y - 1) - 1) / c.stride_y + 1;
    out_w = (c.width + 2 * c.pad_x - c.dilation_x * (c.kernel_x - 1) - 1) / c.stride_x + 1;
    row = (c.width + 2 * c.pad_x + c.stride_x - 1) / c.stride_x;
    size = (c.height + 2 * c.pad_y + c.stride_y - 1) / c.stride_y * row;
    positions = (out_h - 1) * row + out_w;
    for (int64_t tap = 0; tap < taps(); ++tap)
      if (find(phase(tap)) == phases.size()) phases.push_back(phase(tap));
    image = int64_t(phases.size()) * planes * size;
  }

  int64_t taps() const { return c.kernel_y * c.kernel_x; }

  int64_t offset(int64_t tap, int64_t plane) const {
    const int64_t y = tap / c.kernel_x * c.dilation_y, x = tap % c.kernel_x * c.dilation_x;
    return (int64_t(find(phase(tap))) * planes + plane) * size + y / c.stride_y * row + x / c.stride_x;
  }

  // For every entry of a kernel-major weight row, where it is read.
  std::vector<int32_t> offsets() const {
    std::vector<int32_t> all;
    all.reserve(size_t(taps() * planes));
    for (int64_t tap = 0; tap < taps(); ++tap)
      for (int64_t plane = 0; plane < planes; ++plane) all.push_back(int32_t(offset(tap, plane)));
    return all;
  }

  // Put the pixels [height, width] of one channel into an image's planes, zeros around them.
  template <class T>
  void place(const T* pixels, T* to_image, int64_t plane) const {
    for (size_t i = 0; i < phases.size(); ++i) {
      const int64_t fy = phases[i] / c.stride_x, fx = phases[i] % c.stride_x;
      T* to = to_image + (int64_t(i) * planes + plane) * size;
      const T* end = to + size;
      for (int64_t y = fy - c.pad_y; to < end; y += c.stride_y, to += row)
        if (y < 0 || y >= c.height) std::memset(to, 0, size_t(row) * sizeof(T));
        else place_row(pixels + y * c.width, to, fx - c.pad_x);
    }
  }

 private:
  int64_t phase(int64_t tap) const {
    const int64_t y = tap / c.kernel_x * c.dilation_y, x = tap % c.kernel_x * c.dilation_x;
    return y % c.stride_y * c.stride_x + x % c.stride_x;
  }

  size_t find(int64_t wanted) const { return size_t(std::find(phases.begin(), phases.end(), wanted) - phases.begin()); }

  template <class T>
  void place_row(const T* from, T* to, int64_t x) const {
    if (c.stride_x == 1) {
      std::memset(to, 0, size_t(c.pad_x) * sizeof(T));
      std::memcpy(to + c.pad_x, from, size_t(c.width) * sizeof(T));
      std::memset(to + c.pad_x + c.width, 0, size_t(c.pad_x) * sizeof(T));
      return;
    }
    for (int64_t i = 0; i < row; ++i, x += c.stride_x) to[i] = x < 0 || x >= c.width ? T(0) : from[x];
  }
};
