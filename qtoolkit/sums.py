"""Sums of products whose factors may be rounded to bfloat16: by AMX on CPUs that have it, else by torch.

Here for the reason given in ``columns``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit.kernels.cpu.rounding import library as native

DENSE = torch.contiguous_format


def native_on(device: torch.device) -> bool:
    """Say whether ``accumulated`` rounds factors on ``device``, which it does for speed."""
    return device.type == "cpu" and native.sums()


def accumulated(
    total: Tensor, left: Tensor, right: Tensor, keep: float, share: float, *, upper: bool = False
) -> Tensor:
    """Return ``keep * total + share * left @ right`` in the total's place; sums are float32.

    Args:
        total: float32 [m, n], its rows dense.
        left: float32 [m, steps].
        right: float32 [steps, n].
        keep: with 0, what the total holds is not read.
        share: of the product.
        upper: what is below the diagonal may stay as it is.
    """
    if native_on(total.device):
        left, right = (each if 1 in each.stride() else each.clone(memory_format=DENSE) for each in (left, right))
        return native.add_product(total, left, right, keep=keep, share=share, upper=upper)
    return total.addmm_(left, right, beta=keep, alpha=share)
