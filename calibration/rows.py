"""Rounding a layer under the metric of all its outputs: a part of the rows at a time, each making up for those before.

The error is tr(G D H D^T) for D = Q - W, with H of the inputs and G of the outputs. Compensation spreads a column's
error over the columns to come, as H says; here a part of the rows is rounded so, and its error is then spread over the
rows to come, as G says: the same elimination on the other side, block by block. Compare YAQA (Tseng et al. 2025).
Rows of one part do not make up for each other, so a part takes rows far from each other: some of every head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qtoolkit import sweeps
from qtoolkit.calibration import products
from qtoolkit.calibration.refine import descend
from qtoolkit.calibration.triangles import inverse_factor, ordered
from qtoolkit.errors import NumericError
from qtoolkit.scheme import Scheme
from qtoolkit.stages import QuantizedWeight

ROWS = 64  # of a part away from attention heads; 8 rows would gain 3 % more of a layer's error, in eight times the time
PARTS = 32  # at most, there: each is a whole sweep over the columns
STEPS = 1 << 15  # columns of all parts together: they go one after another, so layers with many inputs have fewer parts

TOGETHER = 256  # rows to come are told in so few sizes of products: oneDNN makes code for each

Rounder = Callable[[Tensor, Tensor], QuantizedWeight]


def parts(n: int, k: int, head_dim: int = 0, device: torch.device | None = None) -> list[Tensor]:
    """Return the rows of every part of a layer [n, k], int64; of heads' outputs two channels, half a head apart.

    These two turn together in rotary embeddings, which leaves little coupling between them on the mean over places.
    """
    count = -(-head_dim // 2) or min(PARTS, -(-n // ROWS))
    if count > max(2, STEPS // k):
        count = max(2, STEPS // k)
        count = next((fewer for fewer in range(count, count // 2, -1) if n % fewer == 0), count)  # of one size
    return [torch.arange(first, n, count, device=device) for first in range(count)]


def rounded(
    weight: Tensor, metric: Tensor, several: Sequence[Tensor], scales: Tensor, rounder: Rounder
) -> QuantizedWeight:
    """Return codes and scales of weight float32 [n, k], its rows rounded part by part under ``metric`` [n, n].

    ``rounder`` gets the weight that a part is to have, and of ``scales`` [n, groups], to begin with, its own.

    Raises:
        NumericError: the metric is singular.
    """
    order = torch.cat(list(several))
    factor = inverse_factor(ordered(metric, order.flip(0)))  # G^-1 = F^T F
    if factor is None:
        raise NumericError(f"The metric of {len(metric)} outputs is singular.")
    work, found, start = weight[order], [], 0
    for rows in several:
        stop = start + len(rows)
        made = rounder(work[start:stop], scales[rows])
        gap = made.gap(work[start:stop])
        inside, behind = factor[start:stop, start:stop], stop // TOGETHER * TOGETHER  # what is done gets zeros
        moved = torch.linalg.solve_triangular(inside.T, gap, upper=False)
        work[behind:].addmm_(factor[start:stop, behind:].T, moved)
        found.append(made)
        start = stop
    made, back = QuantizedWeight.joined(found), torch.argsort(order)
    return QuantizedWeight(made.codes[back], made.scales[back])


def refined(
    weight: Tensor,
    matrix: Tensor,
    metric: Tensor,
    several: Sequence[Tensor],
    start: QuantizedWeight,
    scheme: Scheme,
    packed: sweeps.Packed | None = None,
) -> QuantizedWeight:
    """Return ``start`` with new codes, at most its error: every part's visited once more, beside all the others.

    With the other rows' errors D given, the best that a part can have is W_b - G_bb^-1 G_b,rest D_rest; its codes are
    brought nearer to it under H, and what does not lower the error under G is not taken. ``packed`` is the matrix for
    whole sweeps, where they run.
    """
    codes = start.codes.clone()
    lost = start.gap(weight)
    told = products.halved(lost)
    for rows in several:
        inside = metric[rows][:, rows]
        rest = torch.linalg.solve(inside, metric[rows].index_fill(1, rows, 0.0))  # [rows, n]
        gap = products.add(lost[rows], rest, told)  # from what is best
        own = QuantizedWeight(codes[rows], start.scales[rows])
        if packed is None:
            pull = products.times(gap, matrix)
            moving = pull.T.clone(memory_format=torch.contiguous_format)  # of one row it would be the same memory
            after, left = descend(matrix, own, scheme, moving), moving.T
        else:
            steps = own.scales.float()
            after, pull, left = sweeps.descended_with_slopes(packed, gap, own.codes, steps, scheme.code_range)
        apart = after - own.codes if scheme.weight_bits <= 4 else after.short() - own.codes
        step = QuantizedWeight(apart, own.scales).dequantize()
        if ((inside @ left) * (gap + step)).sum() < ((inside @ pull) * gap).sum():
            codes[rows] = after
            lost[rows] += step
            if told is not lost:
                told[rows] = lost[rows].to(told.dtype)
    return QuantizedWeight(codes, start.scales)


def error(weight: Tensor, matrix: Tensor, metric: Tensor, quantized: QuantizedWeight) -> float:
    """Return tr(G D H D^T) for D = Q - W."""
    difference = quantized.gap(weight)
    return float(((metric @ difference @ matrix) * difference).sum())
