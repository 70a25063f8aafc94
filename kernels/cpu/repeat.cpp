// Repeats a list of calls, one after another: what a compiled graph does for a number of tokens, without the Python
// between its calls. Each was made once before with the same arguments, see repeat.py.
#include <cstdint>
#include <cstdio>
#include <exception>
#include <utility>

namespace {

constexpr int MOST = 24;  // arguments

// `own` functions take a pointer to a description and return 0, others take `count` pointers and 64-bit integers.
struct Call {
  void* function;
  const void* own;
  int64_t count;
  int64_t arguments[MOST];
};

template <size_t>
using Integer = int64_t;

template <size_t... I>
void pass(const Call& call, std::index_sequence<I...>) {
  reinterpret_cast<void (*)(Integer<I>...)>(call.function)(call.arguments[I]...);
}

template <size_t COUNT>
void pass(const Call& call) {
  pass(call, std::make_index_sequence<COUNT>());
}

template <size_t... COUNTS>
void choose(const Call& call, std::index_sequence<COUNTS...>) {
  static constexpr void (*ways[])(const Call&) = {pass<COUNTS>...};
  ways[call.count](call);
}

}  // namespace

// Returns how many calls went well, which is `count` or where it stopped; `message`, of `size` bytes, then says why.
extern "C" __attribute__((visibility("default"))) int64_t qtk_repeat(const Call* calls, int64_t count, char* message,
                                                                     int64_t size) {
  for (int64_t i = 0; i < count; ++i) {
    const Call& call = calls[i];
    try {
      if (!call.own) {
        choose(call, std::make_index_sequence<MOST + 1>());
      } else if (reinterpret_cast<int (*)(const void*)>(call.function)(call.own)) {
        std::snprintf(message, size_t(size), "no memory");
        return i;
      }
    } catch (const std::exception& error) {
      std::snprintf(message, size_t(size), "%s", error.what());
      return i;
    }
  }
  return count;
}
