// AMX: whether a process may use tile registers, and their configuration.
// Everything has internal linkage, as in rows.h.
#pragma once
#include <cstdint>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Whether this CPU multiplies tiles of `bit`'s type, and Linux lets this process have their registers.
static inline bool may_use_tiles(int bit) {
#if defined(__x86_64__) && defined(__linux__) && defined(SYS_arch_prctl)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> bit & 1)) return false;
  constexpr long ASK = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM; asking again is no error
  return syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
#else
  (void)bit;
  return false;
#endif
}

constexpr int TILES_OF_BFLOAT16 = 22, TILES_OF_INT8 = 25;  // bits of cpuid 7, edx

// Eight tiles of 16 rows of 64 bytes.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t columns[16] = {64, 64, 64, 64, 64, 64, 64, 64};  // bytes
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Instructions rather than intrinsics: gcc 12's do not tell the compiler that they read memory.
#define TILE_CONFIGURE(configuration) asm volatile("ldtilecfg %0" : : "m"(configuration))
#define TILE_RELEASE() asm volatile("tilerelease" : : : "memory")
#define TILE_LOAD(tile, from, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"(int64_t(stride)) : "memory")
#define TILE_STORE(tile, to, stride) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(to), "r"(int64_t(stride)) : "memory")
#define TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile : : : "memory")
#define TILE_MULTIPLY_INT8(sum, a, b) asm volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #sum : : : "memory")
#define TILE_MULTIPLY_BFLOAT16(sum, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sum : : : "memory")
