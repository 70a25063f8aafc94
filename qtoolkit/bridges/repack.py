"""One layer from one layout to another: the codes bit for bit, the scales exactly where the layout can hold them."""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit.errors import NumericError, RequestError
from qtoolkit.packed import IntegerPacker
from qtoolkit.stages import QuantizedWeight

HALVES = (torch.float16, torch.bfloat16)
MOST = 2.0**-8  # relative error; rounding to bfloat16 loses at most half of it, so more means out of range


def repack(
    name: str, weight: QuantizedWeight, packer: IntegerPacker, dtype: torch.dtype
) -> tuple[dict[str, Tensor], float]:
    """Return a layer's tensors in the layout of ``packer``, and the largest relative error of a scale that matters.

    Args:
        name: of the layer, for errors.
        weight: its codes and scales.
        packer: of the new layout.
        dtype: of the model's floats.

    Raises:
        NumericError: a scale is NaN or Inf.
        RequestError: a scale is outside the range of the new layout.
    """
    if not bool(weight.scales.isfinite().all()):
        raise NumericError(f"{name} has scales that are NaN or Inf.", "The checkpoint is damaged.")
    tensors = packer.pack(QuantizedWeight(weight.codes, stored_scales(weight.scales, packer.name, dtype)))
    back = packer.unpack(tensors)
    assert torch.equal(back.codes, weight.codes), name
    error = _scale_error(weight, back)
    if error > MOST:
        raise RequestError(
            f"{name} has scales outside the range of the layout {packer.name}: relative error {error:.2g}.",
            "Another layout, such as int4, holds them.",
        )
    return tensors, error


def stored_scales(scales: Tensor, layout: str, dtype: torch.dtype) -> Tensor:
    """Return scales in the dtype in which ``layout`` stores them.

    16-bit scales stay what they are. Wider ones, as QQQ files have, get the model's dtype if that holds them exactly;
    if not they stay wide, except in GPTQ files, which have 16 bits: there they are rounded.
    """
    if scales.dtype in HALVES or layout == "qqq":  # QQQ splits scales in two, in its own dtypes
        return scales
    candidates = [dtype] if layout != "gptq" else [*(half for half in HALVES if half == dtype), *HALVES]
    exact = (half for half in candidates if torch.equal(scales.to(half).to(scales.dtype), scales))
    return scales.to(next(exact, candidates[0] if layout == "gptq" else scales.dtype))


def _scale_error(before: QuantizedWeight, after: QuantizedWeight) -> float:
    """Return the largest relative difference of the scales that some code is multiplied with."""
    n, groups = before.scales.shape
    used = before.codes.view(n, groups, -1).any(dim=-1)
    old, new = before.scales.double()[used], after.scales.double()[used]
    if not used.any():
        return 0.0
    return float(((new - old).abs() / old.abs().clamp_min(torch.finfo(torch.float64).tiny)).max())
