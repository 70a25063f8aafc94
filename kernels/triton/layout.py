"""The layout of the Triton kernels: bytes whose low and high nibbles are the two halves of a block of inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit.kernels import folded
from qtoolkit.kernels.reference import unpack_int4
from qtoolkit.kernels.selection import Grid

BLOCK = 128  # inputs of a block: byte j holds input j in its low nibble and input 64 + j in its high one
ROWS = 128  # rows are padded to whole tiles


def padded(size: int) -> int:
    """Round ``size`` up to whole blocks of 128."""
    return -(-size // BLOCK) * BLOCK


def to_halves(codes: Tensor, grid: Grid = Grid.PLAIN) -> Tensor:
    """Pack int8 codes [n, k] (values -8..7) into int8 [n padded, k padded / 2], two's complement nibbles.

    CHAINED: the nibbles of a byte are an even input and the odd one after it: words of ``kernels/chained.py``. FOLDED:
    nibbles are codes + 8, so that a word of them times a group's multiple carries nowhere.
    """
    n, k = codes.shape
    codes = torch.nn.functional.pad(codes, (0, padded(k) - k, 0, padded(n) - n)) + (8 if grid is Grid.FOLDED else 0)
    chained = grid is Grid.CHAINED
    halves = (BLOCK // 2, 2) if chained else (2, BLOCK // 2)
    low, high = codes.reshape(codes.shape[0], -1, *halves).unbind(3 if chained else 2)  # [n, blocks, 64]
    return ((low & 15) | (high << 4)).flatten(1)


def from_halves(weight: Tensor, n: int, k: int, grid: Grid = Grid.PLAIN) -> Tensor:
    """Invert ``to_halves``: return int8 codes [n, k]."""
    if grid is Grid.FOLDED:
        weight = weight ^ -120  # 0x88: codes + 8 become two's complement
    blocks = weight.reshape(weight.shape[0], -1, BLOCK // 2)
    return torch.stack(((blocks << 4) >> 4, blocks >> 4), dim=3 if grid is Grid.CHAINED else 2).flatten(1)[:n, :k]


def to_kernel_scales(scales: Tensor, group_size: int) -> Tensor:
    """Return float32 [groups, n padded], divided by the factor 16 that unpacking leaves in (exact: a power of two).

    Groups of half a block get a last one of zeros where the inputs end in the middle of a block: it is read, too.
    """
    columns = scales[:, :1] if group_size == -1 else scales
    n, groups = columns.shape
    more = groups % 2 if group_size == BLOCK // 2 else 0
    return torch.nn.functional.pad(columns.float().T / 16, (0, padded(n) - n, 0, more)).contiguous()


def to_folded_scales(scales: Tensor, group_size: int) -> Tensor:
    """Return what the product wants of groups that fold: bases float32 [n padded], and behind them multiples.

    Multiples are bytes, [groups, n padded]; groups of half a block get a last one of zeros as in ``to_kernel_scales``.

    Returns:
        float32 [n padded * (1 + groups / 4)], n padded being a multiple of 128.

    Raises:
        ValueError: scales [n, groups] do not fold.
    """
    multiples, base = folded.parts(scales)
    n, groups = multiples.shape
    more = groups % 2 if group_size == BLOCK // 2 else 0
    rows = torch.nn.functional.pad(multiples.T, (0, padded(n) - n, 0, more)).contiguous()
    return torch.cat((torch.nn.functional.pad(base, (0, padded(n) - n)), rows.view(torch.float32).flatten()))


def prepare(packed: Tensor, scales: Tensor, k: int, group_size: int, grid: Grid = Grid.PLAIN) -> tuple[Tensor, Tensor]:
    """Bring a checkpoint's packed int32 [n, k / 8] and scales [n, groups] into this layout.

    It goes over the rows in parts: unpacking takes some ten times the memory of a packed part.
    """
    weight = torch.cat([to_halves(unpack_int4(part, k), grid) for part in packed.split(32 * ROWS)])
    own = to_folded_scales if grid is Grid.FOLDED else to_kernel_scales
    return weight, own(scales, group_size)
