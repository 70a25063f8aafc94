"""Whole weights rounded to the nearest code, number by number: by the native loops where they run, else by torch.

Here for the reason given in ``columns``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit.kernels.cpu.rounding import library as native

TOGETHER = 1 << 17  # weights that torch rounds at a time: they stay in the cache
SMALLEST = 2.0**-24  # the smallest float16 subnormal: a group of zeros needs some scale that every dtype can hold
NORMAL = 2.0**-126  # the smallest normal float32: of a token whose scale is not stored


def rounded(
    weight: Tensor,
    size: int,
    code_range: tuple[int, int],
    times: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return what the nearest codes stand for if every group's scale is its absmax over the largest code.

    Args:
        weight: float32 [n, k].
        size: inputs of a group; k is a multiple.
        code_range: least and largest code.
        times: float32 [k], what inputs are multiplied with first.
        out: takes the result, float32 or bfloat16 [n, k], dense; without it there is a new one in float32.
    """
    if _runs(weight):
        return native.round_rows(weight, size, code_range, SMALLEST, times, out)
    made = torch.empty_like(weight) if out is None else out
    some = max(1, TOGETHER // weight.shape[1])
    for part, to in zip(weight.split(some), made.split(some), strict=True):
        scaled = (part if times is None else part * times).unflatten(1, (-1, size))
        step = (scaled.abs().amax(dim=-1, keepdim=True) / float(code_range[1])).clamp_min(SMALLEST)
        to.copy_((scaled / step).round_().clamp_(*code_range).mul_(step).flatten(1))
    return made


def restored(codes: Tensor, scales: Tensor, less: Tensor | None = None) -> Tensor:
    """Return what ``codes`` int8 [n, k] of ``scales`` [n, groups] stand for, less a weight: float32 [n, k]."""
    if codes.dtype == torch.int8 and native.runs(codes.device, 1) and (less is None or less.dtype == torch.float32):
        return native.restored(codes, scales.float(), less)
    n, k = codes.shape
    groups = scales.shape[1]
    found = codes.float().view(n, groups, k // groups).mul_(scales.float().unsqueeze(-1)).view(n, k)
    return found if less is None else found.sub_(less)


def errors(weight: Tensor, matter: Tensor, scales: Tensor, code_range: tuple[int, int]) -> Tensor:
    """Return for each of some scales the squared error of rounding every group, weighted by ``matter``.

    Args:
        weight: float32 [n, k].
        matter: float32 [k].
        scales: float32 [n, groups, trials], above 0.
        code_range: least and largest code.

    Returns:
        float32 [n, groups, trials].
    """
    groups, trials = scales.shape[1:]
    if _runs(weight) and trials <= native.MOST_TRIALS:
        return native.trial_errors(weight, matter, scales, code_range)
    found = torch.empty_like(scales)
    some = max(1, TOGETHER // weight.shape[1])
    for part, own, to in zip(weight.split(some), scales.split(some), found.split(some), strict=True):
        grouped = part.unflatten(1, (groups, -1))
        for trial in range(trials):
            step = own[..., trial : trial + 1]
            made = (grouped / step).round_().clamp_(*code_range).mul_(step)
            to[..., trial] = made.sub_(grouped).square_().mul_(matter.view(groups, -1)).sum(dim=-1)
    return found


def tokens(x: Tensor, top: int, times: Tensor | None = None) -> Tensor:
    """Return x [..., k] rounded per token to whole numbers of -top to top times its scale, its absmax over ``top``.

    ``times`` [k] multiplies the inputs first.
    """
    if _runs(x) and x.numel():
        made = native.round_rows(x.reshape(-1, x.shape[-1]), x.shape[-1], (-top, top), NORMAL, times)
        return made.view(x.shape)
    codes, scale = token_codes(x if times is None else x * times, top)
    return codes.mul_(scale)


def token_codes(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return the whole numbers of ``tokens``, in x's dtype [..., k], and their scales [..., 1]."""
    largest = torch.maximum(x.amax(dim=-1, keepdim=True), -x.amin(dim=-1, keepdim=True))  # aminmax: 20 times as long
    scale = largest / top
    scale = torch.where(scale > 0, scale, 1.0)  # of zeros any will do
    return (x / scale).round_().clamp_(-top, top), scale


def _runs(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and native.runs(weight.device, 1)
