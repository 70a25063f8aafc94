"""Which weights a pattern keeps: 0/1 masks for N:M, 1xN blocks and whole filters, hard or growing with a schedule.

A mask has the weight's number of dimensions and is multiplied with it. ``dense`` is the part of the pattern that is
not enforced yet: 0 is the pattern itself, 1 leaves everything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit.calibration import criteria
from qtoolkit.vision.matrix import from_matrix, to_matrix
from qtoolkit.vision.pattern import Pattern

TEMPERATURE = 1e-2  # MaxQ's tau
ROUNDS = 10  # leave an error of 1e-7


def mask(weight: Tensor, pattern: Pattern, dense: float = 0.0, criterion: str = "l2") -> Tensor:
    """Return the 0/1 mask of ``pattern`` for a weight [n, c(, height, width)].

    Raises:
        ValueError: the pattern is not a mask (binary, debut).
    """
    if pattern.kind == "nm":
        return nm_mask(weight, *pattern.nm, dense=dense)
    if pattern.kind == "block":
        return block_mask(weight, pattern.rows, pattern.rate * (1 - dense))
    if pattern.kind == "filter":
        return filter_mask(criteria.weight_score(weight, criterion), pattern.rate * (1 - dense), weight.dim())
    raise ValueError(f"the pattern {pattern.name} is not a mask")


def nm_mask(weight: Tensor, kept: int, size: int, dense: float = 0.0) -> Tensor:
    """Return ones at the ``kept`` largest of every ``size`` consecutive inputs.

    The part ``dense`` of the blocks, those with the smallest sums, stays whole (Xiang et al. 2024, MaxQ: the largest
    blocks are pruned first, while training can still make up for it).
    """
    blocks = to_matrix(weight).abs().view(weight.shape[0], -1, size)
    result = torch.zeros_like(blocks).scatter_(2, blocks.topk(kept, dim=2).indices, 1.0)
    whole = round(dense * blocks[..., 0].numel())
    if whole:
        result.view(-1, size)[blocks.sum(dim=2).flatten().argsort()[:whole]] = 1.0
    return from_matrix(result.flatten(1), tuple(weight.shape))


def block_mask(weight: Tensor, rows: int, rate: float) -> Tensor:
    """Return zeros at the part ``rate`` of each row group's input channels with the smallest L1 norms."""
    n, inputs = weight.shape[:2]
    norms = weight.abs().flatten(2).sum(dim=2) if weight.dim() == 4 else weight.abs()
    groups = norms.view(n // rows, rows, inputs).sum(dim=1)  # [groups, inputs]
    keep = torch.ones_like(groups).scatter_(1, groups.argsort(dim=1)[:, : int(rate * inputs)], 0.0)
    return keep.repeat_interleave(rows, dim=0).view(n, inputs, *[1] * (weight.dim() - 2))


def filter_mask(scores: Tensor, rate: float, dims: int) -> Tensor:
    """Return zeros at the part ``rate`` of the filters with the smallest scores [n]; shape [n, 1, ...]."""
    keep = torch.ones_like(scores)
    keep[scores.argsort()[: int(rate * len(scores))]] = 0.0
    return keep.view(-1, *[1] * (dims - 1))


def soft_mask(weight: Tensor, kept: int, size: int, dense: float = 0.0) -> Tensor:
    """Return MaxQ's mask: the N:M mask times 1 + how far a weight stands out in its filter and at its kernel place.

    Source: MaxQ (Xiang et al. 2024). On an axis, with the cut at the part (M - N) / M of the sorted magnitudes and
    theta the mean of the two around it: s = [|w| > theta] sigmoid((|w| - theta) / tau).
    """
    magnitude = weight.abs()
    part = (size - kept) / size
    extra = _stand_out(magnitude.flatten(1), part).view_as(magnitude)
    if weight.dim() == 4 and weight[0, 0].numel() > 1:
        by_place = magnitude.permute(2, 3, 0, 1)  # [height, width, n, c]
        places = _stand_out(by_place.flatten(2).flatten(0, 1), part).view_as(by_place)
        extra = extra + places.permute(2, 3, 0, 1)
    return nm_mask(weight, kept, size, dense) * (1 + extra)


def latent(weight: Tensor, kept: int, size: int) -> Tensor:
    """Return the weight that its own soft mask turns into ``weight``, where that has the pattern already.

    The fixed point of w = weight / mask(w). As masks are 1 to 3 and hardly change with w, each round takes four fifths
    of the error away; weights near a cut, of a matrix that has not the pattern, may keep some.
    """
    found = weight
    for _ in range(ROUNDS):
        found = weight / soft_mask(found, kept, size).clamp_min(1.0)
    return found


def _stand_out(rows: Tensor, part: float) -> Tensor:
    """Return, for each entry of rows [lines, length], sigmoid of its distance to the line's cut, 0 below the cut."""
    cut = min(max(int(part * rows.shape[1]), 1), rows.shape[1] - 1)
    upper = rows.topk(rows.shape[1] - cut + 1, dim=1, sorted=False).values  # a fifth of what sorting takes
    theta = upper.topk(2, dim=1, largest=False).values.mean(dim=1, keepdim=True)
    return torch.where(rows > theta, torch.sigmoid((rows - theta) / TEMPERATURE), 0.0)
