"""What is known of this machine's processor that decides how calibration multiplies fastest on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

CPUINFO = Path("/proc/cpuinfo")


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
    """Return PyTorch's own list, or what Linux tells where PyTorch is too old to have one."""
    if ask := getattr(torch.cpu, "get_capabilities", None):
        found: dict[str, Any] = ask()
        return found
    try:
        text = CPUINFO.read_text()
    except OSError:
        return {}
    return {"cpu_name": "Intel" if "GenuineIntel" in text else "", "amx_bf16": "amx_bf16" in text}
