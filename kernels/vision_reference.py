"""Binary and sparse layers in plain torch: what every kernel must reproduce, and what runs where there is none."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qtoolkit.kernels import vision_layout as layout

Pair = tuple[int, int]


def signs(x: Tensor) -> Tensor:
    """Return float32 +1 where x >= 0 and -1 elsewhere, NaN included."""
    return torch.where(x >= 0, 1.0, -1.0)


def binary_linear(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, thresholds: Tensor | None) -> Tensor:
    """Return signs(x) times the signs in ``words``; see ``vision_ops.binary_linear``."""
    weight = layout.binary_linear_signs(words, len(scale), x.shape[-1])
    return _finish(F.linear(signs(x), weight), scale, bias, thresholds, (-1,)).to(x.dtype)


def binary_conv2d(
    x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, thresholds: Tensor | None,
    kernel: Pair, stride: Pair, padding: Pair, dilation: Pair,
) -> Tensor:  # fmt: skip
    """Return the convolution of signs(x) with the signs in ``words``; padding is 0, which adds nothing to a sum."""
    weight = layout.unpack_signs(words, x.shape[1])  # [n, taps, channels]
    weight = weight.unflatten(1, kernel).permute(0, 3, 1, 2)
    sums = F.conv2d(signs(x), weight, None, stride, padding, dilation)
    return _finish(sums, scale, bias, thresholds, (1, -1, 1, 1)).to(x.dtype)


def _finish(
    sums: Tensor, scale: Tensor, bias: Tensor | None, thresholds: Tensor | None, shape: tuple[int, ...]
) -> Tensor:
    """Scale and shift sums of signs (whole numbers below 2^24: exact), or compare them with thresholds."""
    if thresholds is not None:
        return signs(sums - thresholds.view(shape))
    sums = sums * scale.view(shape)
    return sums if bias is None else sums + bias.view(shape)


def sparse_linear(x: Tensor, values: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    """Return x times the sparse weight; see ``vision_ops.sparse_linear``."""
    weight = layout.sparse_matrix(values, columns, x.shape[-1])
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def sparse_conv2d(
    x: Tensor, values: Tensor, columns: Tensor, bias: Tensor | None,
    kernel: Pair, stride: Pair, padding: Pair, dilation: Pair,
) -> Tensor:  # fmt: skip
    """Return the convolution of x with the sparse weight, whose rows are kernel-major."""
    channels = x.shape[1]
    weight = layout.sparse_matrix(values, columns, kernel[0] * kernel[1] * channels)
    weight = weight.unflatten(1, (*kernel, channels)).permute(0, 3, 1, 2)
    own_bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x, weight.to(x.dtype), own_bias, stride, padding, dilation)
