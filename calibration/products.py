"""Float32 matrix products on a CPU by oneDNN, where it is exact: PyTorch's own choice, MKL, keeps AMD's CPUs at AVX2.

PyTorch asks oneDNN only where products may be less precise than float32. oneDNN makes use of that on CPUs with units
for it (AMX); on the others its float32 products are what they were, at twice the speed (Zen 5, AVX-512). Which it is
shows in a product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

EXACT, RELAXED = "highest", "medium"  # PyTorch's names
SHAPE = (256, 512, 256)  # of the product that is looked at: large enough for oneDNN
WIDE = 1024  # channels of a hidden state from which it pays: oneDNN's code takes 60 MB, and narrow models gain a tenth
ERROR = 4e-6  # relative, of float32 sums of so many products; bfloat16's would be 2e-3


@contextmanager
def fast(device: torch.device, width: int) -> Iterator[None]:
    """Inside, float32 products on a CPU are oneDNN's, if these are exact here and nobody has asked for others.

    ``width`` is that of the model's hidden states; below ``WIDE`` nothing changes.
    """
    if device.type != "cpu" or width < WIDE or _precision() != EXACT:
        yield
        return
    torch.set_float32_matmul_precision(RELAXED)
    try:
        if not exact():
            torch.set_float32_matmul_precision(EXACT)
        yield
    finally:
        torch.set_float32_matmul_precision(EXACT)


@torch.inference_mode()
def exact() -> bool:
    """Tell whether products, as they are set now, have float32's precision."""
    draw = torch.Generator("cpu").manual_seed(0)
    rows, inner, columns = SHAPE
    left, right = (torch.randn(shape, generator=draw, device="cpu") for shape in ((rows, inner), (inner, columns)))
    wanted = left.double() @ right.double()
    return bool((left @ right - wanted).norm() < ERROR * wanted.norm())


def _precision() -> str:
    """Return what products are allowed; nothing where it was said by the newer of PyTorch's two ways, or differs."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return ""
