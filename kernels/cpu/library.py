"""Builds and loads the C++ library, and says which code path it runs on this CPU."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from qtoolkit.kernels import build

FOLDER = Path(__file__).parent
PATH_VARIABLE = "QTOOLKIT_CPU_PATH"  # forces a code path: amx, avx512, avxvnni, avx2 or portable
# Contraction would fuse a product and a sum and round once where the reference rounds twice.
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
         "-ffp-contract=off", "-pthread")  # fmt: skip
AVX2 = ("-mavx2", "-mfma", "-mf16c")
WIDE = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
AVX512 = (*WIDE, "-mavx512vnni")
AMX = (*AVX512, "-mamx-tile", "-mamx-int8")
AVX512_BFLOAT16 = (*WIDE, "-mavx512bf16")
AMX_BFLOAT16 = (*AVX512_BFLOAT16, "-mamx-tile", "-mamx-bf16")

FLOAT32, BFLOAT16, FLOAT16, UINT8 = 0, 1, 2, 3  # as in job.h
DTYPES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}  # of activations
SCALES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.uint8: UINT8}


def units() -> tuple[build.Unit, ...]:
    """Return what the library is made of on this architecture; each instruction set is an object file of its own."""
    names = ("portable", "driver", "operator", "repeat", "bfloat16")
    own = tuple(build.Unit(name, FOLDER / f"{name}.cpp") for name in names)
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return own
    return (
        build.Unit("avx2", FOLDER / "avx2.cpp", AVX2, optional=True),
        build.Unit("avxvnni", FOLDER / "avx2.cpp", (*AVX2, "-mavxvnni"), optional=True),
        build.Unit("avx512", FOLDER / "avx512.cpp", AVX512, optional=True),
        build.Unit("amx", FOLDER / "amx.cpp", AMX, optional=True),
        build.Unit("bfloat16_amx", FOLDER / "bfloat16_amx.cpp", AMX_BFLOAT16, optional=True),
        build.Unit("bfloat16_avx2", FOLDER / "bfloat16_avx2.cpp", AVX2, optional=True),
        build.Unit("bfloat16_avx512", FOLDER / "bfloat16_avx512.cpp", AVX512_BFLOAT16, optional=True),
        *own,
    )


@dataclass(frozen=True)
class Library:
    """The loaded library: its functions, its file, the paths this CPU can run (best first) and the chosen one."""

    functions: ctypes.CDLL
    file: Path
    paths: dict[str, int]
    path: str

    @property
    def path_id(self) -> int:
        """The chosen path's number, as the library's functions want it."""
        return self.paths[self.path]


@lru_cache(maxsize=1)
def load() -> Library:
    """Build the library if need be, load it, and choose a code path.

    Raises:
        build.BuildError: it cannot be built or loaded, or QTOOLKIT_CPU_PATH names no path of this CPU.
    """
    file = build.library("w4a8", units(), tuple(sorted(FOLDER.glob("*.h"))), FLAGS)
    functions = opened(file)
    declare(functions)
    paths = supported_paths(functions.qtk_path_name, functions.qtk_path_supported)
    wanted = os.environ.get(PATH_VARIABLE) or next(iter(paths))
    if wanted not in paths:
        raise build.BuildError(f"{PATH_VARIABLE}={wanted} is no path of this CPU; it has {', '.join(paths)}")
    return Library(functions, file, paths, wanted)


def opened(file: Path) -> ctypes.CDLL:
    """Load a compiled library.

    Raises:
        build.BuildError: the system refuses it.
    """
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:
        raise build.BuildError(f"the library does not load: {error}") from error


def supported_paths(name: Callable[[int], bytes | None], runs: Callable[[int], int]) -> dict[str, int]:
    """Return the code paths that this CPU can run, best first: ``name(i)`` of path i, None behind the last."""
    numbers: dict[str, int] = {}
    while found := name(len(numbers)):
        numbers[found.decode()] = len(numbers)
    return {path: number for path, number in numbers.items() if runs(number)}


@lru_cache(maxsize=1)
def register_operators(name: str, gated_name: str) -> bool:
    """Let the library implement two operators of ``qtoolkit`` for CPU tensors; False when this torch cannot."""
    own = load()
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    names = (name.encode(), gated_name.encode())
    return own.functions.qtk_register(str(torch_library).encode(), b"qtoolkit", *names, own.path_id) == 0


def declare(functions: ctypes.CDLL) -> None:
    """Tell ctypes the signatures of driver.cpp, operator.cpp and bfloat16.cpp."""
    integer, pointer, small = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    functions.qtk_path_name.argtypes, functions.qtk_path_name.restype = [small], ctypes.c_char_p
    functions.qtk_path_supported.argtypes = [small]
    functions.qtk_advise.argtypes, functions.qtk_advise.restype = [pointer, integer], None
    functions.qtk_pack.argtypes, functions.qtk_pack.restype = [pointer, integer, integer, integer, pointer], None
    functions.qtk_linear.argtypes = [
        small, pointer, integer, small, small, integer, integer, integer, integer,
        pointer, pointer, small, pointer, small, pointer,
    ]  # fmt: skip
    functions.qtk_repeat.argtypes, functions.qtk_repeat.restype = [pointer, integer, pointer, integer], integer
    functions.qtk_register.argtypes = [*[ctypes.c_char_p] * 4, small]
    functions.qtk_bfloat16_path_name.argtypes, functions.qtk_bfloat16_path_name.restype = [small], ctypes.c_char_p
    functions.qtk_bfloat16_path_supported.argtypes = [small]
    functions.qtk_bfloat16_pack.argtypes = [pointer, integer, integer, pointer]
    functions.qtk_bfloat16_pack.restype = None
    functions.qtk_bfloat16_survey.argtypes = [pointer, integer, integer, pointer, pointer]
    functions.qtk_bfloat16_compress.argtypes = [pointer, integer, integer, *[pointer] * 4]
    functions.qtk_bfloat16_linear.argtypes = [small, pointer, *[integer] * 4, *[pointer] * 6]
    functions.qtk_read.argtypes, functions.qtk_read.restype = [pointer, integer], ctypes.c_double
    functions.qtk_dot_peak.argtypes, functions.qtk_dot_peak.restype = [small, integer], ctypes.c_double


@lru_cache(maxsize=1)
def failure() -> str | None:
    """Return why the library cannot be used here, or None; asked once a process."""
    try:
        load()
    except build.BuildError as error:
        return str(error)
    return None


def describe() -> dict[str, object]:
    """Return what a person wants to know of the CPU kernels here: path, threads, compiler, files, any failure."""
    reason = failure()
    own = None if reason else load()
    return {
        "path": own.path if own else None,
        "paths": list(own.paths) if own else [],
        "threads": own.functions.qtk_threads() if own else None,
        "compiler": build.compiler(),
        "library": str(own.file) if own else None,
        "cache": str(build.cache_folder()),
        "reason": reason,
    }
