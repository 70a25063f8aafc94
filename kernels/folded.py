"""Folded groups: group scales that are small whole multiples of one scale a channel fold into int8 weights.

Where every scale of a row is ``multiple * base`` with a multiple of -15 to 16, a code times its group's multiple is an
int8 weight, -128..120, and the whole row has one scale. A kernel then keeps one int32 sum over all inputs: nothing is
scaled, converted or added at a group's end. The weight still takes four bits and stays an ordinary group-wise
checkpoint, since multiples and base are read off the scales; a quantizer has to choose scales of that kind
(``calibration/folded.py``). Compare QServe (Lin et al. 2024, section 4.1) and LiquidGEMM (2025), which round group
weights to such integers a second time; here nothing is rounded twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit.kernels import reference

MOST, LEAST = 16, -15  # 16 * -8 is the least int8, and -16 * -8 one more than the largest


def split(scales: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return multiples and bases of scales [n, groups], or None unless every row folds.

    Returns:
        multiples int8 [n, groups], -15..16, and bases float32 [n], 0 or more, with ``scales == multiples * bases``
        exactly.
    """
    scales = scales.float()
    most = scales.abs().amax(dim=1, keepdim=True)
    base, left = torch.zeros_like(most), most[:, 0] > 0  # rows of zeros have multiples 0 of a base of 0
    multiples = torch.zeros_like(scales)
    for top in range(1, MOST + 1):
        tried = most / top
        whole = torch.where(tried > 0, (scales / tried).round(), 0.0)
        fits = left & ((whole * tried == scales) & (whole >= LEAST)).all(dim=1)
        multiples, base = torch.where(fits[:, None], whole, multiples), torch.where(fits[:, None], tried, base)
        left = left & ~fits
    if left.any() or not torch.equal(multiples * base, scales):
        return None
    return multiples.to(torch.int8), base[:, 0]


def parts(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return what ``split`` does.

    Raises:
        ValueError: scales [n, groups] do not fold.
    """
    found = split(scales)
    if found is None:
        raise ValueError("these scales are no small multiples of one scale a channel")
    return found


def integers(codes: Tensor, multiples: Tensor, group_size: int) -> Tensor:
    """Return the int8 weights [n, k] of int4 codes [n, k] under multiples [n, groups] of ``group_size`` inputs each."""
    spread = multiples.to(torch.int16).repeat_interleave(group_size, dim=1)[:, : codes.shape[1]]
    return (codes.to(torch.int16) * spread).to(torch.int8)


def w4a8_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, group_size: int) -> Tensor:
    """Multiply as ``reference.w4a8_linear`` does, with one exact int32 sum over all groups of a row.

    Raises:
        ValueError: scales [n, groups] do not fold.
    """
    multiples, base = parts(scales)
    whole = integers(codes, multiples, group_size)
    return reference.w4a8_linear(x, whole, base[:, None], bias, -1, reference.EXACT_K_INT8)
