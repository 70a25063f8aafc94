"""The operators of compressed vision layers, defined once: schema, shape rule, C++ where it runs, else the reference.

``binary_linear`` and ``binary_conv2d`` take signs of the input times signs of the weight; ``sparse_linear`` and
``sparse_conv2d`` take weights of N:M and 1xN patterns. Weights come from ``vision_layout``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit.kernels import vision_layout as layout, vision_reference as reference
from qtoolkit.kernels.ops import LIBRARY

GEOMETRY = "int[2] kernel, int[2] stride, int[2] padding, int[2] dilation"
LIBRARY.define("binary_linear(Tensor x, Tensor words, Tensor scale, Tensor? bias, Tensor? thresholds) -> Tensor")
LIBRARY.define(
    "binary_conv2d(Tensor x, Tensor words, Tensor ones, Tensor scale, Tensor? bias, Tensor? thresholds, "
    f"{GEOMETRY}) -> Tensor"
)
LIBRARY.define("sparse_linear(Tensor x, Tensor values, Tensor columns, Tensor? bias) -> Tensor")
LIBRARY.define(f"sparse_conv2d(Tensor x, Tensor values, Tensor columns, Tensor? bias, {GEOMETRY}) -> Tensor")
Pair = reference.Pair


def _compiled(x: Tensor) -> bool:
    """Tell whether the C++ kernels take x here; the first call may build them."""
    from qtoolkit.kernels.cpu.vision import library

    return x.device.type == "cpu" and x.dtype == torch.float32 and library.failure() is None


def _binary_linear(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, thresholds: Tensor | None) -> Tensor:
    k, n = x.shape[-1], len(scale)
    _check(words, torch.int32, (-(-n // layout.PANEL), -(-k // layout.WORD), layout.PANEL), "words")
    _check_channels(n, scale, bias, thresholds)
    if not _compiled(x):
        return reference.binary_linear(x, words, scale, bias, thresholds)
    from qtoolkit.kernels.cpu.vision import backend

    return backend.binary_linear(x, words, scale, bias, thresholds)


def _binary_conv2d(
    x: Tensor, words: Tensor, ones: Tensor, scale: Tensor, bias: Tensor | None, thresholds: Tensor | None,
    kernel: Pair, stride: Pair, padding: Pair, dilation: Pair,
) -> Tensor:  # fmt: skip
    n, taps = len(scale), kernel[0] * kernel[1]
    _places(x, kernel, stride, padding, dilation)
    _check(words, torch.int32, (n, taps, -(-x.shape[1] // layout.WORD)), "words")
    _check(ones, torch.int32, (n, taps), "ones")
    _check_channels(n, scale, bias, thresholds)
    if not _compiled(x):
        shape = tuple(kernel), tuple(stride), tuple(padding), tuple(dilation)
        return reference.binary_conv2d(x, words, scale, bias, thresholds, *shape)  # type: ignore[arg-type]
    from qtoolkit.kernels.cpu.vision import backend

    return backend.binary_conv2d(x, words, ones, scale, bias, thresholds, kernel, stride, padding, dilation)


def _sparse_linear(x: Tensor, values: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    _check_sparse(values, columns, bias, x.shape[-1])
    if not _compiled(x):
        return reference.sparse_linear(x, values, columns, bias)
    from qtoolkit.kernels.cpu.vision import backend

    return backend.sparse_linear(x, values, columns, bias)


def _sparse_conv2d(
    x: Tensor, values: Tensor, columns: Tensor, bias: Tensor | None,
    kernel: Pair, stride: Pair, padding: Pair, dilation: Pair,
) -> Tensor:  # fmt: skip
    _places(x, kernel, stride, padding, dilation)
    _check_sparse(values, columns, bias, kernel[0] * kernel[1] * x.shape[1])
    if not _compiled(x):
        shape = tuple(kernel), tuple(stride), tuple(padding), tuple(dilation)
        return reference.sparse_conv2d(x, values, columns, bias, *shape)  # type: ignore[arg-type]
    from qtoolkit.kernels.cpu.vision import backend

    return backend.sparse_conv2d(x, values, columns, bias, kernel, stride, padding, dilation)


def _check(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], name: str) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{name} are {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}")


def _check_channels(n: int, scale: Tensor, bias: Tensor | None, thresholds: Tensor | None) -> None:
    _check(scale, torch.float32, (n,), "scales")
    if bias is not None:
        _check(bias, torch.float32, (n,), "biases")
    if thresholds is not None:
        _check(thresholds, torch.int32, (n,), "thresholds")


def _check_sparse(values: Tensor, columns: Tensor, bias: Tensor | None, k: int) -> None:
    if values.dim() != 4 or not 1 <= values.shape[3] <= layout.MOST_ROWS or k % max(1, values.shape[0]):
        rows = layout.MOST_ROWS
        raise ValueError(f"values are {list(values.shape)}, not [a divisor of {k}, groups, length, 1..{rows}]")
    windows, groups, length, rows = values.shape
    _check(values, torch.float32, (windows, groups, length, rows), "values")
    _check(columns, torch.int32, (windows, groups, length), "columns")
    if bias is not None:
        _check(bias, torch.float32, (groups * rows,), "biases")


def _places(x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> tuple[int, int]:
    """Return height and width of a convolution's output.

    Raises:
        ValueError: x is no batch of images, or too small for the kernel.
    """
    if x.dim() != 4:
        raise ValueError(f"x is {list(x.shape)}, not [images, channels, height, width]")
    height, width = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    )
    if height < 1 or width < 1:
        raise ValueError(f"images of {x.shape[2]} x {x.shape[3]} are too small for a kernel of {list(kernel)}")
    return height, width


def _fake_linear(x: Tensor, n: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


def _fake_conv(x: Tensor, n: int, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    return x.new_empty(x.shape[0], n, *_places(x, kernel, stride, padding, dilation))


LIBRARY.impl("binary_linear", _binary_linear, "CompositeExplicitAutograd")
LIBRARY.impl("binary_conv2d", _binary_conv2d, "CompositeExplicitAutograd")
LIBRARY.impl("sparse_linear", _sparse_linear, "CompositeExplicitAutograd")
LIBRARY.impl("sparse_conv2d", _sparse_conv2d, "CompositeExplicitAutograd")
torch.library.register_fake(
    "qtoolkit::binary_linear",
    lambda x, words, scale, bias, thresholds: _fake_linear(x, scale.shape[0]),
    lib=LIBRARY,
)
torch.library.register_fake(
    "qtoolkit::binary_conv2d",
    lambda x, words, ones, scale, bias, thresholds, *shape: _fake_conv(x, scale.shape[0], *shape),
    lib=LIBRARY,
)
torch.library.register_fake(
    "qtoolkit::sparse_linear",
    lambda x, values, columns, bias: _fake_linear(x, values.shape[1] * values.shape[3]),
    lib=LIBRARY,
)
torch.library.register_fake(
    "qtoolkit::sparse_conv2d",
    lambda x, values, columns, bias, *shape: _fake_conv(x, values.shape[1] * values.shape[3], *shape),
    lib=LIBRARY,
)


def binary_linear(
    x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None = None, thresholds: Tensor | None = None
) -> Tensor:
    """Multiply signs of x with signs of a weight.

    Args:
        x: floating point [..., k]; sign(0) is +1, sign(NaN) is -1. The kernels take float32.
        words: int32 [ceil(n / 64), ceil(k / 32), 64], see ``vision_layout.binary_linear``.
        scale: float32 [n].
        bias: float32 [n] or None.
        thresholds: int32 [n] or None.

    Returns:
        [..., n] in the dtype of x: the sum of k products of signs times ``scale`` plus ``bias``, each rounded once;
        with thresholds +1 where the sum is at least the threshold and -1 elsewhere.

    Raises:
        ValueError: a tensor does not have the shape or dtype said here.
    """
    return torch.ops.qtoolkit.binary_linear(x, words, scale, bias, thresholds)


def binary_conv2d(
    x: Tensor, words: Tensor, ones: Tensor, scale: Tensor, bias: Tensor | None, thresholds: Tensor | None,
    kernel: Pair, stride: Pair, padding: Pair, dilation: Pair,
) -> Tensor:  # fmt: skip
    """Convolve signs of x with signs of a weight; places outside of the image add nothing.

    Args:
        x: floating point [images, channels, height, width].
        words: int32 [n, taps, ceil(channels / 32)], and ``ones`` int32 [n, taps]: see ``vision_layout.binary_conv``.
        ones: the number of +1 in each tap.
        scale: float32 [n]; bias, thresholds: as for ``binary_linear``.
        bias: float32 [n] or None.
        thresholds: int32 [n] or None.
        kernel: height and width; stride, padding and dilation alike.
        stride: of both axes.
        padding: of both axes.
        dilation: of both axes.

    Returns:
        [images, n, out height, out width] in the dtype of x.

    Raises:
        ValueError: a tensor does not have the shape or dtype said here, or the images are too small.
    """
    return torch.ops.qtoolkit.binary_conv2d(x, words, ones, scale, bias, thresholds, kernel, stride, padding, dilation)


def sparse_linear(x: Tensor, values: Tensor, columns: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply x with a sparse weight whose groups of 1 to 4 outputs share a list of columns.

    Args:
        x: floating point [..., k]; the kernels take float32.
        values: float32 [windows, groups, length, rows], see ``vision_layout.sparse_groups``, which checks columns.
        columns: int32 [windows, groups, length], each inside its window of k.
        bias: float32 [groups * rows] or None.

    Returns:
        [..., groups * rows] in the dtype of x. The order of a sum is that of the columns, whatever the batch or the
        number of threads; code paths may round differently (fused multiply-add).

    Raises:
        ValueError: a tensor does not have the shape or dtype said here.
    """
    return torch.ops.qtoolkit.sparse_linear(x, values, columns, bias)


def sparse_conv2d(
    x: Tensor, values: Tensor, columns: Tensor, bias: Tensor | None,
    kernel: Pair, stride: Pair, padding: Pair, dilation: Pair,
) -> Tensor:  # fmt: skip
    """Convolve x with a sparse weight; arguments as in ``sparse_linear`` and ``binary_conv2d``, rows kernel-major.

    Raises:
        ValueError: a tensor does not have the shape or dtype said there, or the images are too small.
    """
    return torch.ops.qtoolkit.sparse_conv2d(x, values, columns, bias, kernel, stride, padding, dilation)
