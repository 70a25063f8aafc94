"""The int4 grid of a weight: which scale each channel or group gets, and rounding onto it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qtoolkit import nearest
from qtoolkit.nearest import SMALLEST, TOGETHER
from qtoolkit.scheme import Scheme

SHRINK = tuple(1 - step / 40 for step in range(0, 25, 3))  # scale candidates: 1.0 down to 0.4 of what clips nothing
NEAR = (-1 / 40, 1 / 40)  # from the best of them: two more are tried, which finds what 25 in a row would


def groups(weight: Tensor, scheme: Scheme) -> Tensor:
    """View a weight [n, k] as [n, groups, inputs of a group]."""
    return weight.view(weight.shape[0], scheme.groups(weight.shape[1]), -1)


def minmax_scales(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """Return absmax / 7 for every group of weight [n, k], rounded to ``dtype``: [n, groups]."""
    top = float(scheme.code_range[1])
    grouped = groups(weight, scheme)
    largest = torch.maximum(grouped.amax(dim=-1), -grouped.amin(dim=-1))  # no absolute values are written down
    return (largest / top).clamp_min(SMALLEST).to(dtype)


def signed_scales(weight: Tensor, scheme: Scheme) -> Tensor:
    """Return for every group of weight [n, k] the least scale that clips nothing, float32 [n, groups].

    Codes reach one step further down than up, and a scale's sign gives that step to the larger end of its group: it is
    below 0 where that is the upper one.
    """
    least, most = scheme.code_range
    grouped = groups(weight, scheme)
    up, down = grouped.amax(dim=-1), -grouped.amin(dim=-1)
    full = torch.maximum(torch.maximum(up, down) / -float(least), torch.minimum(up, down) / float(most))
    return full.clamp_min(SMALLEST).where(up <= down, -full.clamp_min(SMALLEST))


def searched_scales(
    weight: Tensor,
    importance: Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    rounding: Callable[[Tensor, Tensor], Tensor] | None = None,
    signed: bool = False,
) -> Tensor:
    """Return, for every group, the candidate scale with the least squared error weighted by ``importance``.

    Args:
        weight: float32 [n, k].
        importance: float32 [k], how much an error of each input's weight matters (the Hessian's diagonal).
        scheme: gives the groups and the code range.
        dtype: in which the scale is stored; candidates are rounded to it before they are judged.
        rounding: rounds weights [n, groups, size] onto another grid with steps [n, groups, 1]; None: to nearest codes.
        signed: candidates are parts of ``signed_scales``; else of absmax over the largest code. Not with ``rounding``.

    Returns:
        [n, groups] in ``dtype``.
    """
    if rounding is None:
        full = signed_scales(weight, scheme) if signed else minmax_scales(weight, scheme, torch.float32)
        return _best(full, dtype, lambda scales: nearest.errors(weight, importance, scales, scheme.code_range))
    matter = importance.view(scheme.groups(weight.shape[1]), -1)  # [groups, size]
    some = weight.split(max(1, TOGETHER // weight.shape[1]))
    return torch.cat([_searched(part, matter, scheme, dtype, rounding) for part in some])


def _searched(
    weight: Tensor,
    matter: Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    rounding: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    grouped = groups(weight, scheme)

    def errors(scales: Tensor) -> Tensor:
        made = [rounding(grouped, step.unsqueeze(-1)).sub_(grouped) for step in scales.unbind(-1)]
        return torch.stack([gap.square_().mul_(matter).sum(dim=-1) for gap in made], dim=-1)

    return _best(minmax_scales(weight, scheme, torch.float32), dtype, errors)


def _best(full: Tensor, dtype: torch.dtype, errors: Callable[[Tensor], Tensor]) -> Tensor:
    """Return, in ``dtype``, the candidates with the least of the ``errors`` that scales [n, groups, trials] have."""

    def tried(shrink: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scales = at_least(full.unsqueeze(-1) * shrink, SMALLEST).to(dtype)
        error, least = errors(scales.float()).min(dim=-1, keepdim=True)
        places = shrink.expand_as(scales).gather(-1, least)
        return error, scales.gather(-1, least), places

    error, chosen, place = tried(torch.tensor(SHRINK, device=full.device))
    nearby, other, _ = tried((place + torch.tensor(NEAR, device=full.device)).clamp_max(1.0))
    return torch.where(nearby < error, other, chosen).squeeze(-1)


def at_least(scales: Tensor, size: float) -> Tensor:
    """Return ``scales``, of whatever sign, with magnitudes of ``size`` at least."""
    return torch.where(scales.signbit(), scales.clamp_max(-size), scales.clamp_min(size))


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


def rounded(weight: Tensor, scheme: Scheme, times: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Return weight [n, k], its inputs multiplied with ``times`` [k] first, after min-max rounding to the nearest code.

    It comes in ``out`` [n, k], float32 or bfloat16, or else in float32 anew.
    """
    size = weight.shape[1] // scheme.groups(weight.shape[1])
    return nearest.rounded(weight, size, scheme.code_range, times, out)
