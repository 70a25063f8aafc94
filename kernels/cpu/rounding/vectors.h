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

inline void store(Vector value, float* to, int64_t count = WIDTH) {
  std::memcpy(to, &value, size_t(count < WIDTH ? count : WIDTH) * sizeof(float));
}

}  // namespace
