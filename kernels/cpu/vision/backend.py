"""Calls the C++ vision kernels with torch tensors whose shapes ``vision_ops`` has checked; float32 on the CPU."""

from __future__ import annotations

import ctypes

from torch import Tensor

from qtoolkit.kernels.cpu.vision import library

Pair = tuple[int, int]


def binary_linear(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    thresholds: Tensor | None,
    path: str | None = None,
) -> Tensor:
    """Run ``vision_ops.binary_linear``; ``path`` forces a code path (tests and benchmarks)."""
    own, number = _path(path)
    k, n = x.shape[-1], len(scale)
    rows = _rows(x)
    y = x.new_empty(*x.shape[:-1], n)
    held = _dense(words, scale, bias, thresholds)
    failed = own.qtv_binary_linear(
        number, rows.data_ptr(), rows.stride(0), len(rows), k, n, *_pointers(held), y.data_ptr(),
    )  # fmt: skip
    return _made(y, failed)


def binary_conv2d(
    x: Tensor, words: Tensor, ones: Tensor, scale: Tensor, bias: Tensor | None, thresholds: Tensor | None,
    kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, path: str | None = None,
) -> Tensor:  # fmt: skip
    """Run ``vision_ops.binary_conv2d``; ``path`` forces a code path."""
    own, number = _path(path)
    x = x.contiguous()
    shape, y = _convolution(x, len(scale), kernel, stride, padding, dilation)
    held = _dense(words, ones, scale, bias, thresholds)
    failed = own.qtv_binary_conv(
        number, x.data_ptr(), ctypes.byref(shape), *_pointers(held), y.data_ptr(),
    )  # fmt: skip
    return _made(y, failed)


def sparse_linear(x: Tensor, values: Tensor, columns: Tensor, bias: Tensor | None, path: str | None = None) -> Tensor:
    """Run ``vision_ops.sparse_linear``; ``path`` forces a code path."""
    own, number = _path(path)
    windows, groups, length, per_group = values.shape
    k, n = x.shape[-1], groups * per_group
    rows = _rows(x)
    y = x.new_empty(*x.shape[:-1], n)
    held = _dense(values, columns)
    own_bias = _dense(bias)
    failed = own.qtv_sparse_linear(
        number, rows.data_ptr(), rows.stride(0), len(rows), k, n, *_pointers(held), windows, length,
        per_group, *_pointers(own_bias), y.data_ptr(),
    )  # fmt: skip
    return _made(y, failed)


def sparse_conv2d(
    x: Tensor, values: Tensor, columns: Tensor, bias: Tensor | None,
    kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, path: str | None = None,
) -> Tensor:  # fmt: skip
    """Run ``vision_ops.sparse_conv2d``; ``path`` forces a code path."""
    own, number = _path(path)
    windows, groups, length, per_group = values.shape
    x = x.contiguous()
    shape, y = _convolution(x, groups * per_group, kernel, stride, padding, dilation)
    held = _dense(values, columns)
    own_bias = _dense(bias)
    failed = own.qtv_sparse_conv(
        number, x.data_ptr(), ctypes.byref(shape), *_pointers(held), windows, length,
        per_group, *_pointers(own_bias), y.data_ptr(),
    )  # fmt: skip
    return _made(y, failed)


def _path(name: str | None) -> tuple[ctypes.CDLL, int]:
    own = library.load()
    return own.functions, own.path_id if name is None else own.paths[name]


def _convolution(
    x: Tensor, n: int, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> tuple[library.Convolution, Tensor]:
    images, channels, height, width = x.shape
    out = [(x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    shape = library.Convolution(images, channels, height, width, n, *kernel, *stride, *padding, *dilation)
    return shape, x.new_empty(images, n, *out)


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return the tensors contiguous; the caller holds them while the library reads them."""
    return [tensor if tensor is None else tensor.contiguous() for tensor in tensors]


def _pointers(tensors: list[Tensor | None]) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _made(y: Tensor, failed: int) -> Tensor:
    if failed:
        raise MemoryError(f"no memory to lay out the input of a layer with {list(y.shape)} outputs")
    return y
