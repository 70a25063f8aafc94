"""The int4 grid of a weight: which scale each channel or group gets, and rounding onto it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qtoolkit.scheme import Scheme

SHRINK = tuple(1 - step / 40 for step in range(0, 25, 3))  # scale candidates: 1.0 down to 0.4 of absmax / 7
NEAR = (-1 / 40, 1 / 40)  # from the best of them: two more are tried, which finds what 25 in a row would
TOGETHER = 1 << 17  # weights whose scales are searched together: they stay in the cache
SMALLEST = 2.0**-24  # the smallest float16 subnormal: a group of zeros needs some scale that every dtype can hold


def groups(weight: Tensor, scheme: Scheme) -> Tensor:
    """View a weight [n, k] as [n, groups, inputs of a group]."""
    return weight.view(weight.shape[0], scheme.groups(weight.shape[1]), -1)


def minmax_scales(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """Return absmax / 7 for every group of weight [n, k], rounded to ``dtype``: [n, groups]."""
    top = float(scheme.code_range[1])
    return (groups(weight, scheme).abs().amax(dim=-1) / top).clamp_min(SMALLEST).to(dtype)


def searched_scales(
    weight: Tensor,
    importance: Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    rounding: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Return, for every group, the candidate scale with the least squared error weighted by ``importance``.

    Args:
        weight: float32 [n, k].
        importance: float32 [k], how much an error of each input's weight matters (the Hessian's diagonal).
        scheme: gives the groups and the code range.
        dtype: in which the scale is stored; candidates are rounded to it before they are judged.
        rounding: rounds weights [n, groups, size] onto another grid with steps [n, groups, 1]; None: to nearest codes.

    Returns:
        [n, groups] in ``dtype``.
    """
    matter = importance.view(scheme.groups(weight.shape[1]), -1)  # [groups, size]
    some = weight.split(max(1, TOGETHER // weight.shape[1]))
    return torch.cat([_searched(part, matter, scheme, dtype, rounding) for part in some])


def _searched(
    weight: Tensor,
    matter: Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    rounding: Callable[[Tensor, Tensor], Tensor] | None,
) -> Tensor:
    grouped = groups(weight, scheme)
    full = minmax_scales(weight, scheme, torch.float32)
    best = torch.full_like(full, torch.inf)
    chosen, place = full.to(dtype), torch.ones_like(full)

    def judge(shrink: Tensor | float) -> None:
        nonlocal best, chosen, place
        scales = (full * shrink).clamp_min(SMALLEST).to(dtype)
        step = scales.float().unsqueeze(-1)
        if rounding is None:
            rounded = (grouped / step).round_().clamp_(*scheme.code_range).mul_(step)
        else:
            rounded = rounding(grouped, step)
        error = rounded.sub_(grouped).square_().mul_(matter).sum(dim=-1)
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, scales, chosen)
        place = torch.where(better, shrink, place)

    for shrink in SHRINK:
        judge(shrink)
    around = place
    for offset in NEAR:
        judge((around + offset).clamp_max(1.0))
    return chosen


def stiffness(weight: Tensor, importance: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    """Return what a squared error of each scale costs about: the weighted squares of its codes, [n, groups]."""
    matter = importance.view(scheme.groups(weight.shape[1]), -1)
    some = weight.split(max(1, TOGETHER // weight.shape[1]))
    costs = torch.cat([groups(part, scheme).square().mul_(matter).sum(dim=-1) for part in some])
    return costs / scales.float().square()


def to_codes(weight: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    """Round weight [n, k] to the nearest codes, int8 [n, k]."""
    return (
        (groups(weight, scheme) / scales.float().unsqueeze(-1))
        .round()
        .clamp(*scheme.code_range)
        .to(torch.int8)
        .view(weight.shape)
    )


def rounded(weight: Tensor, scheme: Scheme, times: Tensor | None = None) -> Tensor:
    """Return weight [n, k], its inputs multiplied with ``times`` [k] first, after min-max rounding to the nearest code.

    A search can afford this often: parts of the rows go by in the cache.
    """
    made = torch.empty_like(weight)
    some = max(1, TOGETHER // weight.shape[1])
    for part, to in zip(weight.split(some), made.split(some), strict=True):
        torch.mul(part, 1.0 if times is None else times, out=to)
        step = minmax_scales(to, scheme, torch.float32).unsqueeze(-1)
        groups(to, scheme).div_(step).round_().clamp_(*scheme.code_range).mul_(step)
    return made
