"""Group scales for folded groups: each a whole multiple, -15 to 16, of one base a row (``kernels/folded.py``).

Kernels multiply such groups in one integer sum. The scales stay ordinary numbers of their dtype: a base of few
significant bits makes every product exact there.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST, LEAST = 16, -15  # 16 times a code of -8 is the least int8, and -16 times it one more than the largest
TOPS = tuple(8 + step / 2 for step in range(17))  # what a row's largest scale is to be a multiple of, before rounding
FACTOR_BITS = 4  # of a multiple: 15 has four, and 16 is a power of two
AT_ONCE = 1 << 15  # scales that are tried together: narrow layers in one go, wide ones without leaving the caches


def nearest(scales: Tensor, dtype: torch.dtype, importance: Tensor | None = None) -> Tensor:
    """Return the multiples of one base a row that lie nearest to ``scales``.

    Args:
        scales: float [n, groups], not 0.
        dtype: in which they are stored; every returned scale is exact there and so are base and multiple.
        importance: float [n, groups], what a squared error of each scale costs; None: all the same.

    Returns:
        [n, groups] in ``dtype``, of the same signs; groups below half a base get the base.
    """
    wide = scales.double()
    weight = torch.ones_like(wide) if importance is None else importance.double()
    rows = max(1, AT_ONCE // (len(TOPS) * wide.shape[1]))
    parts = zip(wide.split(rows), weight.split(rows), strict=True)
    return torch.cat([_nearest(part, own, dtype) for part, own in parts]).to(dtype)


def _nearest(wide: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    tops = torch.tensor(TOPS, dtype=wide.dtype, device=wide.device)
    size = wide.abs()
    base = _short(size.amax(dim=1, keepdim=True) / tops, dtype)[:, :, None]  # [n, tops, 1]
    most = torch.where(wide < 0, -LEAST, MOST)
    tried = (size[:, None] / base).round_().clamp_(1).minimum(most[:, None]).mul_(base).copysign_(wide[:, None])
    error = (tried - wide[:, None]).square_().mul_(weight[:, None]).sum(dim=2)
    return tried[torch.arange(len(wide), device=wide.device), error.argmin(dim=1)]


def stored(scales: Tensor, dtype: torch.dtype, fold: bool, importance: Tensor | None = None) -> Tensor:
    """Return scales [n, groups] as they are stored in ``dtype``; ``fold``: as multiples of one base a row."""
    return nearest(scales, dtype, importance) if fold and scales.shape[1] > 1 else scales.to(dtype)


def _short(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round values float64 so that each of their multiples up to 16 is exact in ``dtype``."""
    info = torch.finfo(dtype)
    bits = 1 - round(torch.log2(torch.tensor(info.eps)).item()) - FACTOR_BITS
    mantissa, exponent = torch.frexp(values)  # mantissa in [0.5, 1)
    short = torch.ldexp(torch.round(mantissa * 2**bits), exponent - bits)
    least = info.smallest_normal * info.eps  # the smallest subnormal: what is below its grid would be rounded away
    return (short / least).round().clamp_min(1) * least
