"""The output layer on our kernels: bfloat16 as stored, or int8 or int4, whose inputs are quantized per token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qtoolkit.kernels import ops, selection
from qtoolkit.kernels.cpu import bfloat16, bfloat16_compressed
from qtoolkit.packing.int4 import pack_int4
from qtoolkit.scheme import Head

GROUP = 128  # inputs that share a scale in int4
LARGEST_INT8 = 119  # 16 * 7 + 7: the largest code that is a pair of int4 codes
LARGEST_INT4 = 7
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)  # tried on every int4 group; the least squared error wins
ROWS = 4096  # quantized at a time: bounds the memory in between


@dataclass(frozen=True)
class QuantizedHead:
    """An output layer in a kernel's layout; ``group_size`` as the kernel sees it."""

    kind: Head
    prepared: selection.Prepared
    n: int
    group_size: int

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the logits [..., n] of x [..., k], in the dtype of x."""
        if self.kind is Head.INT8:
            x = torch.cat((x, x), dim=-1)  # [..., 2 k]: once for the high codes, once for the low ones
        own = self.prepared
        return ops.w4a8_linear(x, own.weight, own.scales, bias, self.n, self.group_size, own.layout)


@dataclass(frozen=True)
class FloatHead:
    """An output layer in bfloat16, in a layout of our product for CPUs."""

    weight: Tensor | bfloat16_compressed.Compressed
    n: int

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the logits [..., n] of x [..., k], in bfloat16; the same bits in either layout."""
        if isinstance(self.weight, Tensor):
            return bfloat16.linear(x, self.weight, bias, self.n)
        return bfloat16_compressed.linear(x, self.weight, bias, self.n)


def keep(weight: Tensor) -> FloatHead:
    """Bring a bfloat16 matrix [n, k] into 12 bits a value where its values allow that, else into 16: exactly."""
    return FloatHead(bfloat16_compressed.compress(weight) or bfloat16.prepare(weight), weight.shape[0])


class HeadLayer(nn.Module):
    """A ``QuantizedHead`` where transformers expects a linear layer."""

    bias: Tensor | None

    def __init__(self, head: QuantizedHead, bias: Tensor | None) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [..., n] of x [..., k]."""
        return self.head(x, self.bias)


def refuse(n: int, k: int, kind: Head, dtype: torch.dtype, device: str) -> str | None:
    """Return in words why an output layer of k inputs and n tokens does not run so on our kernels here, or None."""
    if kind is Head.FLOAT:
        return bfloat16.refuse(dtype, device)
    if kind is Head.INT4 and k % GROUP:
        return f"its {k} inputs are not a multiple of the group size {GROUP}"
    try:
        backend = selection.choose(_problem(n, k, kind, dtype, device)).backend
    except ValueError as error:
        return str(error)
    return f"only the reference runs it on {device}" if backend is selection.REFERENCE else None


def quantize(weight: Tensor, kind: Head, dtype: torch.dtype) -> QuantizedHead:
    """Round an output layer's weights and bring them into the layout of the kernel that runs here.

    int8 weights run on the int4 kernel: a code c is 16 h + l with h and l in -7..7 (|c| <= 119 makes that possible), so
    the layer is one of twice the inputs, whose two halves see the same activations, with scales 16 s and s. The sums
    are exact, and the kernel's tuning for every machine holds; it reads as many bytes as an int8 kernel would.

    Args:
        weight: floating point [n, k].
        kind: INT8 or INT4.
        dtype: of the activations.
    """
    n, k = weight.shape
    round_rows = _int8_rows if kind is Head.INT8 else _int4_rows
    parts = [round_rows(rows) for rows in _row_blocks(weight)]
    packed = torch.cat([pack_int4(codes) for codes, _ in parts])
    scales = torch.cat([scale for _, scale in parts])
    problem = _problem(n, k, kind, dtype, weight.device.type)
    return QuantizedHead(kind, selection.prepare(packed, scales, problem), n, problem.group_size)


def _problem(n: int, k: int, kind: Head, dtype: torch.dtype, device: str) -> selection.Problem:
    if kind is Head.INT8:
        return selection.Problem(2 * k, n, k, dtype, device)
    return selection.Problem(k, n, GROUP, dtype, device)


def _row_blocks(weight: Tensor) -> Iterator[Tensor]:
    for rows in weight.split(ROWS):
        yield rows.float()


def _scale(absmax: Tensor, largest: int) -> Tensor:
    # In bfloat16 already while rounding: the kernels stream such scales with half of the bytes.
    return (absmax / largest).clamp_min(2.0**-100).bfloat16().float()


def _int8_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes int8 [r, 2 k], high before low, and scales [r, 2]."""
    scale = _scale(rows.abs().amax(1, keepdim=True), LARGEST_INT8)  # [r, 1]
    codes = (rows / scale).round().clamp(-LARGEST_INT8, LARGEST_INT8).to(torch.int16)
    high = (codes + 8) >> 4
    low = codes - 16 * high
    return torch.cat((high, low), 1).to(torch.int8), torch.cat((16 * scale, scale), 1)


def _int4_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes int8 [r, k] and scales [r, k / 128]."""
    grouped = rows.unflatten(1, (-1, GROUP))  # [r, groups, 128]
    absmax = grouped.abs().amax(2, keepdim=True)
    best = torch.full_like(absmax, torch.inf)
    codes, scales = torch.zeros_like(grouped, dtype=torch.int8), torch.zeros_like(absmax)
    for factor in SHRINK:
        scale = _scale(absmax * factor, LARGEST_INT4)
        tried = (grouped / scale).round().clamp(-LARGEST_INT4 - 1, LARGEST_INT4)
        error = (tried * scale - grouped).square().sum(2, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        codes, scales = torch.where(better, tried.to(torch.int8), codes), torch.where(better, scale, scales)
    return codes.flatten(1), scales.flatten(1)
