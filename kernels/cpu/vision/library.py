"""Builds and loads the C++ library of the vision kernels, and says which code path it runs on this CPU."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import lru_cache
from pathlib import Path

from qtoolkit.kernels import build
from qtoolkit.kernels.cpu import library as linear

FOLDER = Path(__file__).parent
AVX512 = (*linear.AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
FUSED = ("-ffp-contract=fast",)  # sparse sums may fuse product and sum; binary results are the reference's bit for bit
ORDER = ("amx", "avx512", "avxvnni", "avx2", "portable")  # every name QTOOLKIT_CPU_PATH may have, best first


class Convolution(ctypes.Structure):
    """The struct of that name in planes.h."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "images", "channels", "height", "width", "n", "kernel_y", "kernel_x", "stride_y", "stride_x", "pad_y",
            "pad_x", "dilation_y", "dilation_x",
        )
    ]  # fmt: skip


def units() -> tuple[build.Unit, ...]:
    """Return what the library is made of on this architecture; each instruction set is an object file of its own."""

    def unit(name: str, source: str, *flags: str, optional: bool = True) -> build.Unit:
        return build.Unit(name, FOLDER / source, flags, optional)

    own = (
        unit("binary_portable", "binary.cpp", optional=False),
        unit("sparse_portable", "sparse.cpp", *FUSED, optional=False),
        unit("driver", "driver.cpp", optional=False),
    )
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return own
    return (
        unit("binary_avx512", "binary.cpp", *AVX512, "-mavx512vpopcntdq"),
        unit("binary_avx2", "binary.cpp", *linear.AVX2),
        unit("sparse_avx512", "sparse.cpp", *AVX512, *FUSED),
        unit("sparse_avx2", "sparse.cpp", *linear.AVX2, *FUSED),
        *own,
    )


def headers() -> tuple[Path, ...]:
    """Return every header that the sources include."""
    return (*sorted(FOLDER.glob("*.h")), linear.FOLDER / "threads.h")


@lru_cache(maxsize=1)
def load() -> linear.Library:
    """Build the library if need be, load it, and choose a code path.

    QTOOLKIT_CPU_PATH forces one; a name that only the W4A8 kernels have (amx, avxvnni) means the next one down here.

    Raises:
        build.BuildError: it cannot be built or loaded, or QTOOLKIT_CPU_PATH names no path of this CPU.
    """
    file = build.library("vision", units(), headers(), linear.FLAGS)
    functions = linear.opened(file)
    declare(functions)
    paths = linear.supported_paths(functions.qtv_path_name, functions.qtv_path_supported)
    return linear.Library(functions, file, paths, choose(os.environ.get(linear.PATH_VARIABLE), tuple(paths)))


def choose(wanted: str | None, paths: tuple[str, ...]) -> str:
    """Return the path to run: the best one, or the best that is not above the one ``wanted``.

    Raises:
        build.BuildError: ``wanted`` is no path of this CPU.
    """
    if not wanted:
        return paths[0]
    known = wanted in paths or wanted not in ("avx512", "avx2", "portable")
    if wanted not in ORDER or not known:
        raise build.BuildError(f"{linear.PATH_VARIABLE}={wanted} is no path of this CPU; it has {', '.join(paths)}")
    return next(name for name in paths if ORDER.index(name) >= ORDER.index(wanted))


def declare(functions: ctypes.CDLL) -> None:
    """Tell ctypes the signatures of driver.cpp."""
    integer, pointer, small = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    convolution = ctypes.POINTER(Convolution)
    functions.qtv_path_name.argtypes, functions.qtv_path_name.restype = [small], ctypes.c_char_p
    functions.qtv_path_supported.argtypes = [small]
    functions.qtv_counts_bits.argtypes = [small]
    functions.qtv_binary_conv.argtypes = [small, pointer, convolution, *[pointer] * 6]
    functions.qtv_binary_linear.argtypes = [small, pointer, *[integer] * 4, *[pointer] * 5]
    functions.qtv_sparse_conv.argtypes = [
        small, pointer, convolution, pointer, pointer, integer, integer, small, pointer, pointer,
    ]  # fmt: skip
    functions.qtv_sparse_linear.argtypes = [
        small, pointer, *[integer] * 4, pointer, pointer, integer, integer, small, pointer, pointer,
    ]  # fmt: skip
    functions.qtv_peak.argtypes, functions.qtv_peak.restype = [small, small, integer], ctypes.c_double


@lru_cache(maxsize=1)
def failure() -> str | None:
    """Return why the library cannot be used here, or None; asked once a process."""
    try:
        load()
    except build.BuildError as error:
        return str(error)
    return None


def describe() -> dict[str, object]:
    """Return what a person wants to know of the vision kernels here: path, how bits are counted, file, any failure."""
    reason = failure()
    own = None if reason else load()
    return {
        "path": own.path if own else None,
        "paths": list(own.paths) if own else [],
        "counts_bits": bool(own.functions.qtv_counts_bits(own.path_id)) if own else False,
        "library": str(own.file) if own else None,
        "reason": reason,
    }
