"""Sums of products whose factors may be rounded, where the CPU multiplies such faster: by our own code, else by torch.

AMX takes factors as bfloat16, AVX512-VNNI as whole numbers of 12 bits, which err by a quarter of that in a product.
Here for the reason given in ``columns``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit.kernels.cpu.rounding import library as native

AMX, VNNI = "amx", "avx512"  # the library's names
DENSE = torch.contiguous_format
SMALL = 1 << 22  # multiply-adds of a product that AVX512-VNNI need not be called for
NARROW = 48  # rows and columns, m n / (m + n), below which it takes longer to round the factors than to multiply them


def native_on(device: torch.device) -> str:
    """Return which units ``accumulated`` rounds factors for on ``device``, which it does for speed, or nothing."""
    return next(iter(native.sums()), "") if device.type == "cpu" else ""


def worthwhile(m: int, steps: int, n: int) -> bool:
    """Tell whether a product [m, steps] [steps, n] is large enough for AVX512-VNNI's to be faster than torch's."""
    return m * steps * n >= SMALL and m * n >= NARROW * (m + n)


def accumulated(total: Tensor, left: Tensor, right: Tensor, keep: float, share: float, *, half: str = "") -> Tensor:
    """Return ``keep * total + share * left @ right`` in the total's place; sums are float32.

    Args:
        total: float32 [m, n], its rows dense.
        left: float32 [m, steps].
        right: float32 [steps, n].
        keep: with 0, what the total holds is not read.
        share: of the product.
        half: "upper": what is below the diagonal may stay as it is; "lower": what is above it does.
    """
    units = native_on(total.device)
    if units == AMX or (units == VNNI and worthwhile(left.shape[0], left.shape[1], right.shape[1])):
        left, right = (each if 1 in each.stride() else each.clone(memory_format=DENSE) for each in (left, right))
        return native.add_product(total, left, right, keep=keep, share=share, half=half)
    if half != "lower":
        return total.addmm_(left, right, beta=keep, alpha=share)
    above = total.triu(1)
    return total.addmm_(left, right, beta=keep, alpha=share).tril_().add_(above)
