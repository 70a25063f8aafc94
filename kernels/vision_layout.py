"""Weights of compressed vision layers as the kernels read them, made from signs, N:M places or 1xN blocks in torch.

The layouts are the same for the C++ kernels and the reference: a layer that moves to another machine needs no other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WORD = 32  # sign bits a word, lowest bit first, 1 for +1
PANEL = 64  # outputs of a binary linear layer side by side
MOST_ROWS = 4  # outputs that share a list of columns
WINDOW = 64  # columns of an N:M layer whose inputs stay in L1 together: 64 * 128 lanes * 4 bytes


def pack_signs(bits: Tensor) -> Tensor:
    """Pack bool [..., k] into int32 [..., ceil(k / 32)]; bits after the last are 0."""
    padded = F.pad(bits.long(), (0, -bits.shape[-1] % WORD)).unflatten(-1, (-1, WORD))
    words = (padded << torch.arange(WORD)).sum(dim=-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_signs(words: Tensor, k: int) -> Tensor:
    """Return float32 [..., k] of -1 and +1 from words int32 [..., ceil(k / 32)]."""
    bits = (words.unsqueeze(-1) >> torch.arange(WORD, dtype=torch.int32, device=words.device)) & 1
    return bits.flatten(-2)[..., :k].float() * 2 - 1


def binary_linear(signs: Tensor) -> Tensor:
    """Return the words int32 [ceil(n / 64), ceil(k / 32), 64] of signs [n, k]: lanes are outputs."""
    words = pack_signs(signs > 0)
    return F.pad(words, (0, 0, 0, -len(words) % PANEL)).unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def binary_linear_signs(words: Tensor, n: int, k: int) -> Tensor:
    """Return float32 [n, k] of -1 and +1, what ``binary_linear`` was given."""
    return unpack_signs(words.transpose(1, 2).flatten(0, 1)[:n], k)


def binary_conv(signs: Tensor, taps: int) -> tuple[Tensor, Tensor]:
    """Return words int32 [n, taps, ceil(channels / 32)] and, for padding, the +1 of each tap, int32 [n, taps].

    Args:
        signs: [n, taps * channels] of -1 and +1, kernel-major: a tap's channels are consecutive.
        taps: places of the kernel.
    """
    by_tap = signs.unflatten(1, (taps, -1)) > 0
    return pack_signs(by_tap), by_tap.sum(dim=2).to(torch.int32)


def sparse_groups(values: Tensor, columns: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Split groups of outputs that share columns into groups of at most four, and columns into windows.

    There are several windows where groups are single outputs and each has as many columns in a window as every other:
    then the inputs of a window are brought close once for all outputs. N:M patterns are such, mostly.

    Args:
        values: float [groups, length, rows].
        columns: integer [groups, length], entries of a weight row, below ``k`` and ascending.
        k: length of a weight row.

    Returns:
        values float32 [windows, groups', length / windows, rows'] and columns int32 [windows, groups', length /
        windows]; rows' divides rows, windows divides k and length.

    Raises:
        ValueError: a column does not exist: kernels would read beyond their input.
    """
    groups, length, rows = values.shape
    if columns.shape != (groups, length) or (columns.numel() and not 0 <= int(columns.min()) <= int(columns.max()) < k):
        raise ValueError(f"columns {list(columns.shape)} are not {[groups, length]} entries of a row of {k}")
    few = next(count for count in range(MOST_ROWS, 0, -1) if rows % count == 0)
    split = values.float().unflatten(2, (-1, few)).transpose(1, 2).flatten(0, 1)  # [groups * rows / few, length, few]
    own_columns = columns.to(torch.int32).repeat_interleave(rows // few, dim=0)
    windows = _windows(own_columns, k) if few == 1 else 1
    by_window = split.unflatten(1, (windows, -1)).transpose(0, 1)
    return by_window.contiguous(), own_columns.unflatten(1, (windows, -1)).transpose(0, 1).contiguous()


def _windows(columns: Tensor, k: int) -> int:
    """Return the number of equal windows, of WINDOW inputs at most, in which groups have equally many columns, or 1."""
    length = columns.shape[1]
    for windows in range(-(-k // WINDOW), -(-2 * k // WINDOW) + 1):
        if windows and length and k % windows == 0 and length % windows == 0:
            window = torch.arange(windows, device=columns.device).repeat_interleave(length // windows)
            if bool((columns // (k // windows) == window).all()):
                return windows
    return 1


def sparse_matrix(values: Tensor, columns: Tensor, k: int) -> Tensor:
    """Return the dense matrix [groups * rows, k] of ``sparse_groups``; a column named twice counts twice."""
    _windows, groups, _length, rows = values.shape
    dense = values.new_zeros(groups, k, rows)
    flat = values.transpose(0, 1).flatten(1, 2)  # [groups, windows * length, rows]
    dense.scatter_add_(1, columns.transpose(0, 1).flatten(1).long().unsqueeze(2).expand_as(flat), flat)
    return dense.transpose(1, 2).flatten(0, 1)
