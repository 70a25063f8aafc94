// Memory that a thread keeps from call to call, so that calls allocate nothing.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <memory>

struct Scratch {
  std::unique_ptr<char, void (*)(void*)> memory{nullptr, std::free};
  size_t size = 0;

  // Aligned to 64 bytes; null when memory is short. What it held is lost when it grows.
  char* take(size_t bytes) {
    if (bytes > size) {
      size = (bytes + 4095) / 4096 * 4096;
      memory.reset(static_cast<char*>(std::aligned_alloc(64, size)));
      if (!memory) size = 0;
    }
    return memory.get();
  }
};
