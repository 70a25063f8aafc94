// Vectors of the widest registers that an instruction set has, and rounding in them. Internal linkage: every source that is
// compiled for several instruction sets has its own.
#pragma once
#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int64_t WIDTH = 16;
#elif defined(__AVX__)
constexpr int64_t WIDTH = 8;
#else
constexpr int64_t WIDTH = 4;
#endif
typedef float Vector __attribute__((vector_size(WIDTH * sizeof(float))));
typedef int32_t Bits __attribute__((vector_size(WIDTH * sizeof(int32_t))));
constexpr float HALFWAY = 12582912.0f;  // 1.5 * 2^23: added and taken away, it rounds to nearest even

// The nearest whole number within the range; low for NaN.
inline Vector code(Vector value, float low, float high) {
  const Vector least = Vector{} + low, most = Vector{} + high;
  value = value > least ? value : least;
  value = value < most ? value : most;
  return (value + HALFWAY) - HALFWAY;
}

// The first `count` numbers, zeros behind them.
inline Vector load(const float* from, int64_t count = WIDTH) {
  Vector made{};
  std::memcpy(&made, from, size_t(count < WIDTH ? count : WIDTH) * sizeof(float));
  return made;
}

inline Vector load(const int8_t* from, int64_t count = WIDTH) {
  typedef int8_t Bytes __attribute__((vector_size(WIDTH)));
  Bytes bytes{};
  std::memcpy(&bytes, from, size_t(count < WIDTH ? count : WIDTH));
  return __builtin_convertvector(bytes, Vector);
}

inline void store(Vector value, float* to, int64_t count = WIDTH) {
  std::memcpy(to, &value, size_t(count < WIDTH ? count : WIDTH) * sizeof(float));
}

// fn(place, numbers from there on: WIDTH of them but at the end), for the whole vectors and then for what is left of [first, last).
template <class F>
inline void each_vector(int64_t first, int64_t last, F fn) {
  int64_t i = first;
  for (; i + WIDTH <= last; i += WIDTH) fn(i, WIDTH);
  if (i < last) fn(i, last - i);
}

// e^x for x of 0 or less: 2^n times a polynomial (Cephes, expf); NaN stays.
inline Vector exponential(Vector x) {
  x = x < -87.0f ? Vector{} - 87.0f : x;
  const Vector shifted = x * 1.44269504f + HALFWAY, n = shifted - HALFWAY;
  const Vector f = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vector y = f * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * f + 8.3334519073e-3f;
  y = y * f + 4.1665795894e-2f;
  y = y * f + 1.6666665459e-1f;
  y = y * f + 5.0000001201e-1f;
  y = y * f * f + f + 1.0f;
  Bits power;
  std::memcpy(&power, &shifted, sizeof power);
  power = (power - 0x4b400000 + 127) << 23;  // n stands in the lowest bits of 1.5 * 2^23 + n
  Vector scale;
  std::memcpy(&scale, &power, sizeof scale);
  return y * scale;
}

}  // namespace
