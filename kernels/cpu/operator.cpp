// The operator as torch's dispatcher calls it, without Python in between: a microsecond instead of five.
//
// Only torch's stable C interface is used, found by name in the libtorch_cpu that the process has loaded: no torch
// header, no link, so one build serves every torch that has these functions (2.10 and newer); without them the Python
// face calls qtk_linear itself. Schema: (Tensor x, Tensor weight, Tensor scales, Tensor? bias, SymInt n,
// int group_size) -> Tensor; every argument arrives in one 64-bit slot, tensors as handles that the kernel owns.
#include <dlfcn.h>
#include <cstdint>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include "job.h"

extern "C" int qtk_linear(int path, const void* x, int64_t x_stride, int dtype, int gated, int64_t m, int64_t k,
                          int64_t n, int64_t group_size, const void* weight, const void* scales, int scale_dtype,
                          const void* bias, int bias_dtype, void* y);

namespace {

using Slot = uint64_t;
using Handle = void*;
using Error = int32_t;  // 0 is success

struct Torch {
  Error (*init_impl)(const char* ns, const char* key, const char* file, uint32_t line, Handle* library);
  Error (*impl)(Handle library, const char* name, void (*kernel)(Slot*, uint64_t, uint64_t), uint64_t version);
  Error (*data)(Handle, void**);
  Error (*dim)(Handle, int64_t*);
  Error (*sizes)(Handle, int64_t**);
  Error (*strides)(Handle, int64_t**);
  Error (*dtype)(Handle, int32_t*);
  Error (*empty)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*);
  Error (*copy)(Handle to, Handle from, int32_t non_blocking);
  Error (*release)(Handle);
  void (*release_slot)(Slot*);  // null before 2.13: the slot of an optional is plain new's
  int32_t cpu;
  int32_t dtypes[4];  // torch's numbers of FLOAT32, BFLOAT16, FLOAT16, UINT8
};

Torch torch;
int chosen_path;

void check(Error error) {
  if (error) throw std::runtime_error("torch refused a call of the W4A8 operator");
}

struct Tensor {
  Handle handle = nullptr;
  char* data = nullptr;
  int64_t dim = 0;
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  int dtype = -1;

  explicit Tensor(Handle own) : handle(own) {
    if (!handle) return;
    int32_t number;
    void* start;
    check(torch.data(handle, &start)), check(torch.dim(handle, &dim)), check(torch.sizes(handle, &sizes));
    check(torch.strides(handle, &strides)), check(torch.dtype(handle, &number));
    data = static_cast<char*>(start);
    for (int i = 0; i < 4; ++i)
      if (torch.dtypes[i] == number) dtype = i;
  }
  Tensor(const Tensor&) = delete;
  ~Tensor() {
    if (handle) torch.release(handle);
  }

  bool contiguous() const {
    int64_t expected = 1;
    for (int64_t i = dim - 1; i >= 0; expected *= sizes[i--])
      if (sizes[i] != 1 && strides[i] != expected) return false;
    return true;
  }

  bool floating() const { return dtype >= 0 && dtype != UINT8; }

  bool is(int64_t a, int64_t b, int64_t c) const {
    return dim == 3 && sizes[0] == a && sizes[1] == b && sizes[2] == c && contiguous();
  }
};

constexpr int MOST_DIMS = 16;

// A new contiguous tensor with x's sizes but `last` as the last one.
Handle make(const Tensor& x, int64_t last) {
  int64_t sizes[MOST_DIMS], strides[MOST_DIMS], stride = 1;
  std::memcpy(sizes, x.sizes, size_t(x.dim) * sizeof(int64_t));
  sizes[x.dim - 1] = last;
  for (int64_t i = x.dim - 1; i >= 0; stride *= sizes[i] ? sizes[i] : 1, --i) strides[i] = stride;
  Handle made;
  check(torch.empty(x.dim, sizes, strides, torch.dtypes[x.dtype], torch.cpu, 0, &made));
  return made;
}

Handle copy(const Tensor& x) {
  Handle made = make(x, x.sizes[x.dim - 1]);
  check(torch.copy(made, x.handle, 0));
  return made;
}

Handle run(const Tensor& x, const Tensor& weight, const Tensor& scales, const Tensor& bias, int64_t n,
           int64_t group_size, bool gated) {
  if (x.dim < 1 || x.dim > MOST_DIMS || !x.floating()) throw std::invalid_argument("x must be floating point [..., k]");
  const int64_t width = x.sizes[x.dim - 1], k = gated ? width / 2 : width, panels = (n + PANEL - 1) / PANEL, steps = (k + 3) / 4;
  const int64_t groups = group_size == -1 ? 1 : group_size < 4 || group_size % 4 ? -1 : (k + group_size - 1) / group_size;
  if (k < 1) throw std::invalid_argument("a layer needs inputs, and x has none");
  if (gated && width % 2) throw std::invalid_argument("gate and up must have the same size");
  const int64_t scale_rows = scales.dtype == UINT8 ? BASE_ROWS + groups : groups;
  if (groups < 0 || !weight.is(panels, steps, STEP_BYTES) || !scales.is(panels, scale_rows, PANEL) || scales.dtype < 0 ||
      scales.dtype == FLOAT16)
    throw std::invalid_argument("weight and scales are not those of " + std::to_string(k) + " inputs, " +
                                std::to_string(n) + " outputs and groups of " + std::to_string(group_size));
  if (bias.handle && (bias.dim != 1 || bias.sizes[0] != n || !bias.floating()))
    throw std::invalid_argument("bias must be floating point [" + std::to_string(n) + "]");
  if (bias.handle && !bias.contiguous()) {
    Tensor dense(copy(bias));
    return run(x, weight, scales, dense, n, group_size, gated);
  }
  const bool rows = x.contiguous() || (x.dim == 2 && (x.strides[1] == 1 || width == 1));
  if (!rows) {
    Tensor dense(copy(x));
    return run(dense, weight, scales, bias, n, group_size, gated);
  }
  int64_t m = 1;
  for (int64_t i = 0; i < x.dim - 1; ++i) m *= x.sizes[i];
  Tensor y(make(x, n));
  const int64_t stride = x.contiguous() ? width : x.strides[0];
  if (qtk_linear(chosen_path, x.data, stride, x.dtype, gated, m, k, n, group_size, weight.data, scales.data, scales.dtype,
                 bias.data, bias.dtype, y.data))
    throw std::bad_alloc();
  Handle made = y.handle;
  y.handle = nullptr;
  return made;
}

template <bool gated>
void kernel(Slot* stack, uint64_t, uint64_t) {
  auto handle = [](Slot slot) { return reinterpret_cast<Handle>(slot); };
  Handle bias = nullptr;
  if (Slot* inner = reinterpret_cast<Slot*>(stack[3])) {
    bias = handle(*inner);
    if (torch.release_slot) torch.release_slot(inner);
    else delete inner;
  }
  Tensor x(handle(stack[0])), weight(handle(stack[1])), scales(handle(stack[2])), own_bias(bias);
  stack[0] = reinterpret_cast<Slot>(run(x, weight, scales, own_bias, int64_t(stack[4]), int64_t(stack[5]), gated));
}

template <class Function>
bool find(void* library, const char* name, Function& into) {
  into = reinterpret_cast<Function>(dlsym(library, name));
  return into != nullptr;
}

}  // namespace

// Register the operator `ns::name` for CPU tensors, and `ns::gated_name` for the one that takes gate and up, both run on
// code path `path`; torch_library is libtorch_cpu's file.
// Returns 0, or 1 when this torch lacks a function: nothing is registered then.
extern "C" __attribute__((visibility("default"))) int qtk_register(const char* torch_library, const char* ns,
                                                                   const char* name, const char* gated_name, int path) {
  void* library = dlopen(torch_library, RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return 1;
  int32_t (*number)();
  const char* types[] = {"aoti_torch_dtype_float32", "aoti_torch_dtype_bfloat16", "aoti_torch_dtype_float16",
                         "aoti_torch_dtype_uint8"};
  for (int i = 0; i < 4; ++i) {
    if (!find(library, types[i], number)) return 1;
    torch.dtypes[i] = number();
  }
  if (!find(library, "aoti_torch_device_type_cpu", number)) return 1;
  torch.cpu = number();
  find(library, "torch_delete_stable_ivalue", torch.release_slot);
  if (!(find(library, "aoti_torch_library_init_impl", torch.init_impl) && find(library, "torch_library_impl", torch.impl) &&
        find(library, "aoti_torch_get_data_ptr", torch.data) && find(library, "aoti_torch_get_dim", torch.dim) &&
        find(library, "aoti_torch_get_sizes", torch.sizes) && find(library, "aoti_torch_get_strides", torch.strides) &&
        find(library, "aoti_torch_get_dtype", torch.dtype) && find(library, "aoti_torch_empty_strided", torch.empty) &&
        find(library, "aoti_torch_copy_", torch.copy) && find(library, "aoti_torch_delete_tensor_object", torch.release)))
    return 1;
  chosen_path = path;
  Handle own;  // never freed: the registration lives as long as the process
  constexpr uint64_t VERSION = uint64_t(2) << 56 | uint64_t(10) << 48;
  return torch.init_impl(ns, "CPU", __FILE__, 0, &own) || torch.impl(own, name, kernel<false>, VERSION) ||
         torch.impl(own, gated_name, kernel<true>, VERSION);
}
