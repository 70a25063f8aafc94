"""The layout of the Triton kernels: bytes whose low and high nibbles are the two halves of a block of inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit.kernels.reference import unpack_int4

BLOCK = 128  # inputs of a block: byte j holds input j in its low nibble and input 64 + j in its high one
ROWS = 128  # rows are padded to whole tiles


def padded(size: int) -> int:
    """Round ``size`` up to whole blocks of 128."""
    return -(-size // BLOCK) * BLOCK


def to_halves(codes: Tensor, chained: bool = False) -> Tensor:
    """Pack int8 codes [n, k] (values -8..7) into int8 [n padded, k padded / 2], two's complement nibbles.

    With ``chained`` the nibbles of a byte are an even input and the odd one after it: words of ``kernels/chained.py``.
    """
    n, k = codes.shape
    codes = torch.nn.functional.pad(codes, (0, padded(k) - k, 0, padded(n) - n))
    halves = (BLOCK // 2, 2) if chained else (2, BLOCK // 2)
    low, high = codes.reshape(codes.shape[0], -1, *halves).unbind(3 if chained else 2)  # [n, blocks, 64]
    return ((low & 15) | (high << 4)).flatten(1)


def from_halves(weight: Tensor, n: int, k: int, chained: bool = False) -> Tensor:
    """Invert ``to_halves``: return int8 codes [n, k]."""
    blocks = weight.reshape(weight.shape[0], -1, BLOCK // 2)
    return torch.stack(((blocks << 4) >> 4, blocks >> 4), dim=3 if chained else 2).flatten(1)[:n, :k]


def to_kernel_scales(scales: Tensor, group_size: int) -> Tensor:
    """Return float32 [groups, n padded], divided by the factor 16 that unpacking leaves in (exact: a power of two).

    Groups of half a block get a last one of zeros where the inputs end in the middle of a block: it is read, too.
    """
    columns = scales[:, :1] if group_size == -1 else scales
    n, groups = columns.shape
    more = groups % 2 if group_size == BLOCK // 2 else 0
    return torch.nn.functional.pad(columns.float().T / 16, (0, padded(n) - n, 0, more)).contiguous()


def prepare(packed: Tensor, scales: Tensor, k: int, group_size: int, chained: bool = False) -> tuple[Tensor, Tensor]:
    """Bring a checkpoint's packed int32 [n, k / 8] and scales [n, groups] into this layout.

    It goes over the rows in parts: unpacking takes some ten times the memory of a packed part.
    """
    parts = [to_halves(unpack_int4(part, k), chained) for part in packed.split(32 * ROWS)]
    return torch.cat(parts), to_kernel_scales(scales, group_size)
