"""The layouts of the Hopper kernels, as reversible permutations: weights in fragment order, tokens swizzled."""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit.kernels.reference import unpack_int4

ROWS = K_BLOCK = 128
# One 128 x 128 chunk of codes, split so that every index of the register-operand fragment of m64k32 is an axis:
# rows: 64-row block, warp, half of 16 rows (+8), lane / 4;
# inputs: pair of k-steps, k-step, half of 32 (+16), lane % 4, byte
_SPLIT = (2, 4, 2, 8, 2, 2, 2, 4, 4)
# Memory order: block, pair, thread (warp, lane / 4, lane % 4), word (k-step, half of 32), byte, nibble (half of 16)
_ORDER = (0, 4, 1, 3, 7, 5, 6, 8, 2)


def padded(size: int) -> int:
    """Round ``size`` up to whole chunks of 128."""
    return -(-size // K_BLOCK) * K_BLOCK


def _padded_codes(codes: Tensor) -> Tensor:
    n, k = codes.shape
    return torch.nn.functional.pad(codes, (0, padded(k) - k, 0, padded(n) - n))


def to_fragments(codes: Tensor) -> Tensor:
    """Permute int4 codes so that a thread's 16 bytes of shared memory are two k-steps of its register operand.

    The high nibbles of a word fill one operand register (rows lane / 4) and the low nibbles the next (rows + 8), which
    makes unpacking three logic operations for eight weights.

    Args:
        codes: int8 [n, k], values -8..7.

    Returns:
        uint8 [n padded / 128, k padded / 128, 8192]; two's complement nibbles.
    """
    codes = _padded_codes(codes)
    n, k = codes.shape[0] // ROWS, codes.shape[1] // K_BLOCK
    chunks = codes.reshape(n, ROWS, k, K_BLOCK).transpose(1, 2).reshape(n, k, *_SPLIT)
    nibbles = chunks.permute(0, 1, *(2 + axis for axis in _ORDER)).reshape(n, k, -1, 2).to(torch.uint8) & 0xF
    return nibbles[..., 0] << 4 | nibbles[..., 1]


def from_fragments(weight: Tensor, n: int, k: int) -> Tensor:
    """Invert ``to_fragments``: return int8 codes [n, k]."""
    rows, columns, _ = weight.shape
    nibbles = torch.stack((weight >> 4, weight & 0xF), dim=-1).to(torch.int8)  # [.., 8192, 2]
    shape = tuple(_SPLIT[axis] for axis in _ORDER)
    inverse = tuple(2 + _ORDER.index(axis) for axis in range(len(_ORDER)))
    chunks = nibbles.reshape(rows, columns, *shape).permute(0, 1, *inverse).reshape(rows, columns, ROWS, K_BLOCK)
    codes = chunks.transpose(1, 2).reshape(rows * ROWS, columns * K_BLOCK)[:n, :k]
    return torch.where(codes > 7, codes - 16, codes)


def to_kernel_scales(scales: Tensor, group_size: int) -> Tensor:
    """Bring scales [n, groups] into kernel order: float32 [groups, n padded], divided by unpacking's factor of 16.

    Padding rows get scale 0. The division is by a power of two and so exact.
    """
    n = scales.shape[0]
    columns = scales[:, :1] if group_size == -1 else scales
    return torch.nn.functional.pad(columns.float().T / 16, (0, padded(n) - n)).contiguous()


def to_swizzled(codes: Tensor) -> Tensor:
    """Lay int8 token codes [tokens, k] out as the quantizer does: int8 [k padded / 128, tokens8, 128], swizzled.

    Rows from ``tokens`` to ``tokens8`` (the next multiple of 8) are zero here and unwritten by the kernel.
    """
    tokens, k = codes.shape
    full = torch.nn.functional.pad(codes, (0, padded(k) - k, 0, -tokens % 8))
    chunks = full.reshape(full.shape[0], -1, 8, 16).transpose(0, 1)  # [k blocks, tokens8, chunk, 16 bytes]
    token = torch.arange(full.shape[0], device=codes.device)
    order = torch.arange(8, device=codes.device)[None, :] ^ (token % 8)[:, None]  # an involution
    return chunks[:, token[:, None], order].reshape(chunks.shape[0], -1, K_BLOCK)


def prepare(packed: Tensor, scales: Tensor, k: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Bring a checkpoint's packed int32 [n, k / 8] and scales [n, groups] into this layout.

    It goes over the rows in parts: unpacking takes some ten times the memory of a packed part.
    """
    parts = [to_fragments(unpack_int4(part, k)) for part in packed.split(32 * ROWS)]
    return torch.cat(parts), to_kernel_scales(scales, group_size)
