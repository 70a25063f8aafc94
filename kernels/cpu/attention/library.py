"""Builds and loads the attention library, refuses what it cannot run, and calls it."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from qtoolkit.kernels import build
from qtoolkit.kernels.cpu import library as linear

FOLDER = Path(__file__).parent
GROUP = 32  # dimensions of a head and tokens of a page come in multiples of it
MOST_DIM = 512


class Call(ctypes.Structure):
    """The struct ``Attention`` of job.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "output", "keys", "values", "table", "starts", "lengths")),
        *(
            (name, ctypes.c_int64)
            for name in (
                "query_stride", "output_stride", "page_stride", "head_stride", "table_stride", "sequences", "heads",
                "key_heads", "dim", "page",
            )
        ),
        ("scale", ctypes.c_double),
        ("tiles", ctypes.c_bool),
    ]  # fmt: skip


class Batch(ctypes.Structure):
    """The struct ``Batch`` of job.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("table", "starts", "lengths")),
        ("table_stride", ctypes.c_int64),
        ("slots", ctypes.c_void_p),
    ]


class Again(ctypes.Structure):
    """The struct ``Again`` of driver.cpp: what ``qta_step_again`` is called with."""

    _fields_ = [
        ("call", Call),
        ("key", ctypes.c_void_p),
        ("key_stride", ctypes.c_int64),
        ("value", ctypes.c_void_p),
        ("value_stride", ctypes.c_int64),
        ("batch", ctypes.POINTER(Batch)),
    ]


def units() -> tuple[build.Unit, ...]:
    """Return what the library is made of on this architecture."""
    driver = build.Unit("driver", FOLDER / "driver.cpp", () if x86() else ("-DWITHOUT_AVX512",))
    if not x86():
        return (driver,)
    flags = (*linear.AVX512, "-mavx512bf16")
    return (
        build.Unit("avx512", FOLDER / "avx512.cpp", flags, optional=True),
        build.Unit("amx", FOLDER / "amx.cpp", (*flags, "-mamx-tile", "-mamx-bf16"), optional=True),
        driver,
    )


def x86() -> bool:
    """Say whether this is a 64-bit x86."""
    return platform.machine().lower() in ("x86_64", "amd64")


def headers() -> tuple[Path, ...]:
    """Return every header that the sources include."""
    shared = (linear.FOLDER / name for name in ("scratch.h", "threads.h", "tiles.h"))
    return (*sorted(FOLDER.glob("*.h")), *shared)


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL:
    """Build the library if need be and load it.

    Raises:
        build.BuildError: it cannot be built or loaded, or this CPU cannot run it.
    """
    wanted = os.environ.get(linear.PATH_VARIABLE) or "avx512"
    if wanted not in ("amx", "avx512"):
        raise build.BuildError(f"{linear.PATH_VARIABLE}={wanted} is asked for, and attention has amx and avx512 only")
    functions = linear.opened(build.library("attention", units(), headers(), linear.FLAGS))
    functions.qta_attend.argtypes = [ctypes.POINTER(Call)]
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    functions.qta_step.argtypes = [ctypes.POINTER(Call), pointer, integer, pointer, integer, pointer]
    functions.qta_dot_peak.argtypes, functions.qta_dot_peak.restype = [ctypes.c_int64], ctypes.c_double
    if not functions.qta_supported():
        raise build.BuildError("this CPU, or the compiler, has no AVX512 with bfloat16")
    return functions


@lru_cache(maxsize=1)
def tiles() -> bool:
    """Say whether AMX multiplies where there are rows enough: if this CPU has it and QTOOLKIT_CPU_PATH allows it."""
    return os.environ.get(linear.PATH_VARIABLE, "amx") in ("", "amx") and bool(load().qta_may_use_tiles())


@lru_cache(maxsize=1)
def failure() -> str | None:
    """Return why the library cannot be used here, or None; asked once a process."""
    try:
        load()
    except build.BuildError as error:
        return str(error)
    return None


def refuse(heads: int, key_heads: int, dim: int, dtype: torch.dtype) -> str | None:
    """Return why attention of this shape does not run here, or None; the first call may compile the library."""
    if dtype != torch.bfloat16:
        return f"it is computed in {dtype}, not bfloat16"
    if dim % GROUP or not 0 < dim <= MOST_DIM:
        return f"its heads have {dim} elements, not a multiple of {GROUP} up to {MOST_DIM}"
    if heads % key_heads:
        return f"{heads} heads do not share {key_heads} key/value heads evenly"
    return failure()


def attend(
    query: Tensor, cache: Tensor, output: Tensor, table: Tensor, starts: Tensor, lengths: Tensor, scale: float
) -> None:
    """Write causal attention of a batch of sequences into ``output``; a sequence's queries are the last of its tokens.

    Args:
        query: bfloat16 [tokens, heads, dim]; tokens may lie any distance apart, heads and elements are dense.
        cache: bfloat16 [pages, key heads, page, 2 dim], ``page`` a multiple of 32; a page of a head is dense, its keys
            are [dim, page] and its values [page, dim], see job.h.
        output: like ``query``.
        table: int32 [sequences, pages]: which pages a sequence's tokens lie in, in order.
        starts: int32 [sequences + 1]: the first query of each sequence, and the end.
        lengths: int32 [sequences]: tokens of each sequence in the cache, no fewer than its queries.
        scale: positive; scores are multiplied with it.

    Raises:
        ValueError: a shape, stride or dtype is not as said.
        MemoryError: there is none for intermediate values.
    """
    call = described(query, cache, output, table, starts, lengths, scale)
    if load().qta_attend(ctypes.byref(call)):
        raise MemoryError(f"no memory for attention of {query.shape[0]} tokens of {query.shape[1]} heads")


def described(
    query: Tensor, cache: Tensor, output: Tensor, table: Tensor, starts: Tensor, lengths: Tensor, scale: float
) -> Call:
    """Return a call of ``attend`` as the library wants it.

    Raises:
        ValueError: a shape, stride or dtype is not as said there.
    """
    _, heads, dim = query.shape
    _, key_heads, page, both = cache.shape
    sequences = lengths.shape[0]
    if output.shape != query.shape or both != 2 * dim or page % GROUP or dim % GROUP or heads % key_heads:
        raise ValueError(
            f"query {list(query.shape)}, cache {list(cache.shape)} and output {list(output.shape)} do not belong "
            "together"
        )
    if query.stride()[1:] != (dim, 1) or output.stride()[1:] != (dim, 1) or cache.stride()[2:] != (both, 1):
        raise ValueError(f"heads or pages are not dense: strides {query.stride()}, {output.stride()}, {cache.stride()}")
    if {query.dtype, cache.dtype, output.dtype} != {torch.bfloat16}:
        raise ValueError(f"query, cache and output are {query.dtype}, {cache.dtype} and {output.dtype}, not bfloat16")
    if {table.dtype, starts.dtype, lengths.dtype} != {torch.int32} or table.stride(1) != 1:
        raise ValueError("table, starts and lengths must be dense int32")
    if starts.shape[0] <= sequences or table.shape[0] < sequences:
        raise ValueError(f"{sequences} sequences have {starts.shape[0]} starts and {table.shape[0]} rows of pages")
    keys = cache.data_ptr()
    return Call(
        query.data_ptr(), output.data_ptr(), keys, keys + 2 * page * dim, table.data_ptr(), starts.data_ptr(),
        lengths.data_ptr(), query.stride(0), output.stride(0), cache.stride(0), cache.stride(1), table.stride(0),
        sequences, heads, key_heads, dim, page, scale, tiles(),
    )  # fmt: skip
