"""llama.cpp's CPU backend through ggml's C interface: Q4_0, Q4_K, Q8_0 and bf16, weights repacked where it can.

Arguments: number of threads, and the folder with libggml*.so (llama-cpp-python keeps them in ``llama_cpp/lib``).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from random import Random

from loop import Kind, Layer, serve

F32, Q4_0, Q8_0, Q4_K, BF16 = 0, 2, 8, 12, 30  # enum ggml_type
SUCCESS = 0


class Context(ctypes.Structure):
    """``ggml_init_params``: with no_alloc, only descriptions live in the context."""

    _fields_ = (("size", c_size_t), ("buffer", c_void_p), ("no_alloc", ctypes.c_bool))


class Ggml:
    """The functions used here, with their C types; every tensor, buffer and context is an opaque pointer."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self.cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
        pointer = c_void_p
        self.init = self._function(self.base, "ggml_init", pointer, Context)
        self.free = self._function(self.base, "ggml_free", None, pointer)
        self.new_2d = self._function(self.base, "ggml_new_tensor_2d", pointer, pointer, c_int, c_int64, c_int64)
        self.mul_mat = self._function(self.base, "ggml_mul_mat", pointer, pointer, pointer, pointer)
        self.new_graph = self._function(self.base, "ggml_new_graph", pointer, pointer)
        self.expand = self._function(self.base, "ggml_build_forward_expand", None, pointer, pointer)
        self.nbytes = self._function(self.base, "ggml_nbytes", c_size_t, pointer)
        self.set = self._function(self.base, "ggml_backend_tensor_set", None, pointer, pointer, c_size_t, c_size_t)
        self.quantize = self._function(
            self.base, "ggml_quantize_chunk", c_size_t, c_int, POINTER(c_float), pointer, c_int64, c_int64, c_int64,
            pointer,
        )  # fmt: skip
        self.place = self._function(self.base, "ggml_backend_alloc_ctx_tensors_from_buft", pointer, pointer, pointer)
        self.place_plain = self._function(self.base, "ggml_backend_alloc_ctx_tensors", pointer, pointer, pointer)
        self.compute = self._function(self.base, "ggml_backend_graph_compute", c_int, pointer, pointer)
        self.backend = self._function(self.cpu, "ggml_backend_cpu_init", pointer)()
        self._function(self.cpu, "ggml_backend_cpu_set_n_threads", None, pointer, c_int)(self.backend, threads)
        self.repacked = self._repacking_buffer()

    @staticmethod
    def _function(library: ctypes.CDLL, name: str, result: object, *arguments: object) -> Callable[..., int]:
        function = getattr(library, name)
        function.restype, function.argtypes = result, list(arguments)
        return function

    def _repacking_buffer(self) -> int | None:
        """Return the first extra buffer type of the CPU device: the one that repacks weights."""
        registry = self._function(self.cpu, "ggml_backend_cpu_reg", c_void_p)()
        address = self._function(self.base, "ggml_backend_reg_get_proc_address", c_void_p, c_void_p, c_char_p)
        device = self._function(self.base, "ggml_backend_reg_dev_get", c_void_p, c_void_p, c_size_t)(registry, 0)
        found = address(registry, b"ggml_backend_dev_get_extra_bufts")
        if not found:
            return None
        kinds = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(found)(device)
        return kinds[0] if kinds else None

    def context(self) -> int:
        """Return a context for a few descriptions."""
        return self.init(Context(1 << 20, None, True))


def maker(ggml: Ggml, kind: int) -> Callable[[int, int], Layer]:
    """Return a maker of layers with weights of type ``kind``."""

    def make(k: int, n: int) -> Layer:
        draw = Random(k * 31 + n)
        row = (c_float * k)(*(draw.gauss(0, 1) for _ in range(k)))
        own = ggml.context()
        weight = ggml.new_2d(own, kind, k, n)
        size = ggml.nbytes(weight)
        one = (ctypes.c_char * (size // n))()
        ggml.quantize(kind, row, ctypes.cast(one, c_void_p), 0, 1, k, None)
        data = bytes(one) * n  # every row the same: the time of a product does not depend on its values
        repack = ggml.repacked if kind in (Q4_0, Q4_K) else None  # what it repacks on x86
        if not (ggml.place(own, repack) if repack else ggml.place_plain(own, ggml.backend)):
            raise MemoryError(f"ggml gave no memory for {k} x {n}")
        ggml.set(weight, data, 0, size)

        @cache
        def graph(m: int) -> int:
            scratch = ggml.context()
            x = ggml.new_2d(scratch, F32, k, m)
            product = ggml.mul_mat(scratch, weight, x)
            made = ggml.new_graph(scratch)
            ggml.expand(made, product)
            ggml.place_plain(scratch, ggml.backend)
            ggml.set(x, (c_float * (k * m))(*(list(row) * m)), 0, 4 * k * m)
            return made

        def run(m: int) -> None:
            if ggml.compute(ggml.backend, graph(m)) != SUCCESS:
                raise RuntimeError("ggml could not compute the product")

        return run

    return make


if __name__ == "__main__":
    library = Ggml(Path(sys.argv[2]), int(sys.argv[1]))
    serve(
        {
            "llamacpp-q4_k": Kind(4.5, True, maker(library, Q4_K)),
            "llamacpp-q4_0": Kind(4.5, True, maker(library, Q4_0)),
            "llamacpp-q8_0": Kind(8.5, True, maker(library, Q8_0)),
            "llamacpp-bf16": Kind(16, False, maker(library, BF16)),
        }
    )
