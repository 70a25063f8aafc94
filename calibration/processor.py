"""What is known of this machine's processor that decides how calibration multiplies fastest on it."""

from __future__ import annotations

from typing import Any

import torch


def is_intel() -> bool:
    """Tell whether it is one of Intel's, for which MKL's float32 products are made; not, where PyTorch cannot tell."""
    return "intel" in str(_known().get("cpu_name", "")).lower()


def has_bfloat16() -> bool:
    """Tell whether its products of bfloat16 are faster than those of float32.

    Intel's units for that are tiles (AMX): without them, as in some virtual machines, oneDNN's bfloat16 takes twice
    float32's time.
    """
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # not every version of PyTorch can tell
    return supported is not None and supported() and (bool(_known().get("amx_bf16")) or not is_intel())


def _known() -> dict[str, Any]:
    return getattr(torch.cpu, "get_capabilities", dict)()
