"""The layouts of the Hopper kernels, as reversible permutations: weights in fragment order, tokens swizzled."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qtoolkit.kernels import folded
from qtoolkit.kernels.reference import unpack_int4
from qtoolkit.kernels.selection import Grid

ROWS = K_BLOCK = 128


@dataclass(frozen=True)
class Order:
    """How one 128 x 128 chunk of codes lies in memory: the chunk split into axes, and the axes' order.

    Attributes:
        split: sizes of the axes. Rows: 64-row block, warp, half of 16 rows (+8), lane / 4; then the inputs.
        order: axes as they follow in memory; the last is the nibble.
        high: which of the last axis's two is the high nibble.
        offset: what a code has on top in its nibble; 0 is two's complement.
    """

    split: tuple[int, ...]
    order: tuple[int, ...]
    high: int
    offset: int = 0

    @property
    def inverse(self) -> tuple[int, ...]:
        """Return where each axis stands in memory."""
        return tuple(self.order.index(axis) for axis in range(len(self.order)))


# Inputs: pair of k-steps, k-step, half of 32 (+16), lane % 4, byte.
# Memory: block, pair, thread (warp, lane / 4, lane % 4), word (k-step, half of 32), byte, nibble (half of 16 rows)
PLAIN = Order((2, 4, 2, 8, 2, 2, 2, 4, 4), (0, 4, 1, 3, 7, 5, 6, 8, 2), 0)
# Inputs: pair of k-steps, half of 32, lane % 4, byte, odd: eight neighbouring inputs are a word.
# Memory: block, pair, thread, word (half of 32, half of 16 rows), byte, nibble (odd inputs high: the first k-step)
CHAINED = Order((2, 4, 2, 8, 2, 2, 4, 4, 2), (0, 4, 1, 3, 6, 5, 2, 7, 8), 1)
# As PLAIN, but a nibble is code + 8, so that a word of them times a group's multiple carries nowhere.
FOLDED = replace(PLAIN, offset=8)
ORDERS = {Grid.PLAIN: PLAIN, Grid.CHAINED: CHAINED, Grid.FOLDED: FOLDED}
CHUNK = ROWS * K_BLOCK // 2  # bytes of a chunk's codes


def padded(size: int) -> int:
    """Round ``size`` up to whole chunks of 128."""
    return -(-size // K_BLOCK) * K_BLOCK


def _padded_codes(codes: Tensor) -> Tensor:
    n, k = codes.shape
    return torch.nn.functional.pad(codes, (0, padded(k) - k, 0, padded(n) - n))


def to_fragments(codes: Tensor, grid: Grid = Grid.PLAIN) -> Tensor:
    """Permute int4 codes so that a thread's 16 bytes of shared memory are two k-steps of its register operand.

    PLAIN: the high nibbles of a word fill one operand register (rows lane / 4) and the low nibbles the next (rows + 8),
    which makes unpacking three logic operations for eight weights. CHAINED: the 16 bytes as they are fill the operand
    of the first k-step, and shifted by a nibble that of the second; see ``kernels/chained.py``. FOLDED: as PLAIN, with
    nibbles of code + 8.

    Args:
        codes: int8 [n, k], values -8..7.
        grid: which of the three.

    Returns:
        uint8 [n padded / 128, k padded / 128, 8192]; two's complement nibbles but for FOLDED.
    """
    order = ORDERS[grid]
    codes = _padded_codes(codes) + order.offset
    n, k = codes.shape[0] // ROWS, codes.shape[1] // K_BLOCK
    chunks = codes.reshape(n, ROWS, k, K_BLOCK).transpose(1, 2).reshape(n, k, *order.split)
    nibbles = chunks.permute(0, 1, *(2 + axis for axis in order.order)).reshape(n, k, -1, 2).to(torch.uint8) & 0xF
    return nibbles[..., order.high] << 4 | nibbles[..., 1 - order.high]


def from_fragments(weight: Tensor, n: int, k: int, grid: Grid = Grid.PLAIN) -> Tensor:
    """Invert ``to_fragments``, or ``with_multiples`` of it: return int8 codes [n, k]."""
    order = ORDERS[grid]
    weight = weight[:, :, :CHUNK]
    rows, columns, _ = weight.shape
    halves = (weight >> 4, weight & 0xF) if order.high == 0 else (weight & 0xF, weight >> 4)
    nibbles = torch.stack(halves, dim=-1).to(torch.int8)  # [.., 8192, 2]
    shape = tuple(order.split[axis] for axis in order.order)
    inverse = tuple(2 + place for place in order.inverse)
    chunks = nibbles.reshape(rows, columns, *shape).permute(0, 1, *inverse).reshape(rows, columns, ROWS, K_BLOCK)
    codes = chunks.transpose(1, 2).reshape(rows * ROWS, columns * K_BLOCK)[:n, :k]
    return codes - order.offset if order.offset else torch.where(codes > 7, codes - 16, codes)


def with_multiples(fragments: Tensor, multiples: Tensor, group_size: int) -> Tensor:
    """Put behind each chunk's codes its rows' multiples, so that one copy brings both.

    Args:
        fragments: uint8 [row chunks, k blocks, 8192], of FOLDED order.
        multiples: int8 [n, groups], -15..16; see ``kernels/folded.py``.
        group_size: inputs of a group, whole k-blocks.

    Returns:
        uint8 [row chunks, k blocks, 8320].
    """
    rows, k_blocks, _ = fragments.shape
    own = multiples.view(torch.uint8).repeat_interleave(group_size // K_BLOCK, dim=1)  # [n, k blocks]
    own = torch.nn.functional.pad(own, (0, 0, 0, rows * ROWS - own.shape[0]))
    return torch.cat((fragments, own.view(rows, ROWS, k_blocks).transpose(1, 2)), dim=2)


def multiples_of(weight: Tensor, n: int, group_size: int) -> Tensor:
    """Return the multiples int8 [n, groups] that ``with_multiples`` put into ``weight``."""
    own = weight[:, :, CHUNK:].transpose(1, 2).reshape(-1, weight.shape[1])
    return own[:n, :: group_size // K_BLOCK].view(torch.int8)


def to_kernel_scales(scales: Tensor, group_size: int, factor: int = 16) -> Tensor:
    """Bring scales [n, groups] into kernel order: float32 [groups, n padded], divided by unpacking's ``factor``.

    Padding rows get scale 0. The division is by a power of two and so exact.
    """
    n = scales.shape[0]
    columns = scales[:, :1] if group_size == -1 else scales
    return torch.nn.functional.pad(columns.float().T / factor, (0, padded(n) - n)).contiguous()


def to_swizzled(codes: Tensor, grid: Grid = Grid.PLAIN) -> Tensor:
    """Lay int8 token codes [tokens, k] out as the quantizer does: int8 [k padded / 128, tokens8, 128], swizzled.

    Rows from ``tokens`` to ``tokens8`` (the next multiple of 8) are zero here and unwritten by the kernel. CHAINED
    weights want the odd inputs of each 64 first, then the even ones.
    """
    tokens, k = codes.shape
    full = torch.nn.functional.pad(codes, (0, padded(k) - k, 0, -tokens % 8))
    if grid is Grid.CHAINED:
        full = full.reshape(full.shape[0], -1, 32, 2).flip(3).transpose(2, 3).reshape(full.shape)
    chunks = full.reshape(full.shape[0], -1, 8, 16).transpose(0, 1)  # [k blocks, tokens8, chunk, 16 bytes]
    token = torch.arange(full.shape[0], device=codes.device)
    places = torch.arange(8, device=codes.device)[None, :] ^ (token % 8)[:, None]  # an involution
    return chunks[:, token[:, None], places].reshape(chunks.shape[0], -1, K_BLOCK)


def prepare(packed: Tensor, scales: Tensor, k: int, group_size: int, grid: Grid = Grid.PLAIN) -> tuple[Tensor, Tensor]:
    """Bring a checkpoint's packed int32 [n, k / 8] and scales [n, groups] into this layout.

    It goes over the rows in parts: unpacking takes some ten times the memory of a packed part.

    Raises:
        ValueError: ``grid`` is FOLDED and these scales do not fold.
    """
    weight = torch.cat([to_fragments(unpack_int4(part, k), grid) for part in packed.split(32 * ROWS)])
    if grid is not Grid.FOLDED:
        return weight, to_kernel_scales(scales, group_size)
    multiples, base = folded.parts(scales)
    return with_multiples(weight, multiples, group_size), to_kernel_scales(base[:, None], -1, 1)
