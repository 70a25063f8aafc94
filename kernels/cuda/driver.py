"""Loads compiled kernels and launches them through the CUDA driver (libcuda), without any CUDA package for Python."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache

from qtoolkit.kernels.cuda import compiler
from qtoolkit.kernels.cuda.source import Kernel

MAX_DYNAMIC_SHARED = 8  # CUfunction_attribute
SHARED_CARVEOUT = 9
CLUSTER_DIMENSION = 4  # CUlaunchAttributeID
PROGRAMMATIC_SERIALIZATION = 6
INVALID_CONTEXT = 201  # CUresult: this thread has no context yet

# (grid, cluster, arguments, stream, early): `early` lets the launch overlap the end of the one before it on the stream.
Launch = Callable[[int, int, Sequence[object], int, bool], None]


class Dim3(ctypes.Structure):
    """Three unsigned sizes."""

    _fields_ = (("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint))


class AttributeValue(ctypes.Union):
    """CUlaunchAttributeValue: 64 bytes."""

    _fields_ = (("bytes", ctypes.c_char * 64), ("cluster", Dim3), ("flag", ctypes.c_int))


class Attribute(ctypes.Structure):
    """CUlaunchAttribute: id, padding to 8 bytes, value."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", AttributeValue))


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", Dim3),
        ("block", Dim3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("count", ctypes.c_uint),
    )


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """Return libcuda; raises OSError where no NVIDIA driver is installed."""
    return ctypes.CDLL("libcuda.so.1")


def check(status: int, what: str) -> None:
    """Raise RuntimeError with CUDA's own words if ``status`` is not success."""
    if status:
        words = ctypes.c_char_p()
        library().cuGetErrorString(status, ctypes.byref(words))
        raise RuntimeError(f"{what} failed: {(words.value or b'unknown error').decode()} (CUDA error {status})")


def ensure_context(device: int) -> None:
    """Give this thread the device's primary context, the one that torch uses, if it has none: threads start without."""
    cuda, context = library(), ctypes.c_void_p()
    check(cuda.cuCtxGetCurrent(ctypes.byref(context)), "reading the current context")
    if not context.value:
        check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "retaining the primary context")
        check(cuda.cuCtxSetCurrent(context), "setting the current context")


def launch_config(
    kernel: Kernel, grid: int, cluster: int, stream: int, early: bool
) -> tuple[Config, ctypes.Array[Attribute]]:
    """Fill the driver's launch description; the attributes must live as long as it is used."""
    attributes = (Attribute * 2)()
    count = 0
    if cluster > 1:
        attributes[count].id = CLUSTER_DIMENSION
        attributes[count].value.cluster = Dim3(cluster, 1, 1)
        count += 1
    if early:
        attributes[count].id = PROGRAMMATIC_SERIALIZATION
        attributes[count].value.flag = 1
        count += 1
    config = Config(Dim3(grid, 1, 1), Dim3(kernel.threads, 1, 1), kernel.shared_bytes, stream, attributes, count)
    return config, attributes


def pointers_to(arguments: Sequence[object]) -> ctypes.Array[ctypes.c_void_p]:
    """Return the array of argument addresses that a launch takes; ``arguments`` are ctypes values."""
    return (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))  # type: ignore[arg-type]


@lru_cache(maxsize=1024)
def load(kernel: Kernel, device: int) -> Launch:
    """Compile ``kernel`` (or take it from the cache) and load it on ``device``, which must be torch's current one."""
    cuda = library()
    ensure_context(device)
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    check(cuda.cuModuleLoadData(ctypes.byref(module), compiler.cubin(kernel.text())), f"loading {kernel.entry}")
    check(cuda.cuModuleGetFunction(ctypes.byref(function), module, kernel.entry.encode()), f"finding {kernel.entry}")
    check(cuda.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, kernel.shared_bytes), "reserving shared memory")
    check(cuda.cuFuncSetAttribute(function, SHARED_CARVEOUT, 100), "preferring shared memory")

    def launch(grid: int, cluster: int, arguments: Sequence[object], stream: int, early: bool) -> None:
        config, _attributes = launch_config(kernel, grid, cluster, stream, early)
        pointers = pointers_to(arguments)
        status = cuda.cuLaunchKernelEx(ctypes.byref(config), function, pointers, None)
        if status == INVALID_CONTEXT:
            ensure_context(device)
            status = cuda.cuLaunchKernelEx(ctypes.byref(config), function, pointers, None)
        if status:
            check(status, f"launching {kernel.entry} with {dict(kernel.defines)}, grid {grid}, cluster {cluster}")

    return launch
