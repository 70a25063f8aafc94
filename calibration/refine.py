"""Codes and scales made better after compensation: coordinate descent on the codes, least squares for the scales.

Both lower the same quadratic, tr((Q - W) H (Q - W)^T), which GPTQ lowers greedily: it never looks back at a column it
has rounded, and it takes the scales as given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit import columns, sweeps
from qtoolkit.calibration import products
from qtoolkit.calibration.folded import stored
from qtoolkit.calibration.grid import SMALLEST, groups
from qtoolkit.scheme import Scheme
from qtoolkit.stages import QuantizedWeight

COLUMNS = 128  # columns visited before any other is told in a product
RIDGE = 1e-6  # relative to a row's mean diagonal: groups that hold only zero codes leave their scale undetermined


def refined(
    weight: Tensor,
    matrix: Tensor,
    start: QuantizedWeight,
    scheme: Scheme,
    rounds: int,
    fold: bool = False,
    refit: bool = False,
    packed: sweeps.Packed | None = None,
) -> QuantizedWeight:
    """Return codes and scales with at most the error of ``start`` in every row.

    Args:
        weight: float32 [n, k], the target.
        matrix: float32 [k, k], the damped Hessian; positive definite; or ``products.halved``.
        start: what compensation gave; the scales' dtype is kept.
        scheme: gives the code range.
        rounds: of new codes, after new scales where they are refitted.
        fold: scales are to be multiples of one base a row, see ``folded``.
        refit: False leaves the scales: 0.3 % more of a layer's error, in half the time.
        packed: the matrix for whole sweeps, where they run.
    """
    best = start
    if not refit:
        return descended(weight, matrix, start, scheme, rounds, packed) if rounds else start
    product = _times(weight, matrix, packed)
    for _ in range(rounds):
        scaled = QuantizedWeight(best.codes, refitted_scales(weight, matrix, best, scheme, fold, product))
        best = descended(weight, matrix, scaled, scheme, 1, packed)
    return best


def descended(
    weight: Tensor, matrix: Tensor, start: QuantizedWeight, scheme: Scheme, rounds: int, packed: sweeps.Packed | None
) -> QuantizedWeight:
    """Return ``start`` with codes that ``rounds`` of visits to every column have made better."""
    if packed is not None:
        gap, steps = start.gap(weight), start.scales.float()
        return QuantizedWeight(
            sweeps.descended(packed, gap, start.codes, steps, scheme.code_range, rounds), start.scales
        )
    slope, best = gradient(weight, matrix, start), start
    for left in reversed(range(rounds)):
        best = QuantizedWeight(descend(matrix, best, scheme, slope, follow=left > 0), best.scales)
    return best


def gradient(weight: Tensor, matrix: Tensor, quantized: QuantizedWeight) -> Tensor:
    """Return H (Q - W)^T, float32 [k, n]."""
    return products.times(matrix, quantized.gap(weight).T)


def refitted_scales(
    weight: Tensor,
    matrix: Tensor,
    start: QuantizedWeight,
    scheme: Scheme,
    fold: bool = False,
    product: Tensor | None = None,
) -> Tensor:
    """Return the scales [n, groups] that suit the codes best, in their dtype; a row that gains nothing keeps its own.

    With the codes fixed the error is quadratic in a row's scales: entry (a, b) of its matrix is c_a H_ab c_b^T over
    the groups a and b, and the right side w H c_a^T. ``product`` is w H, where it is known.
    """
    codes = groups(start.codes.to(weight.dtype), scheme)  # [n, groups, size]
    n, count, size = codes.shape
    gram = weight.new_empty(n, count, count)
    for index in range(count):  # the half that the other half repeats
        first = index * size
        part = products.times(codes[:, index], matrix[first : first + size, first:])  # [n, the rest of k]
        gram[:, index, index:] = part.view(n, -1, size).mul_(codes[:, index:]).sum(dim=2)
        gram[:, index:, index] = gram[:, index, index:]
    product = products.times(weight, matrix) if product is None else product
    right = (product.view(n, count, size) * codes).sum(dim=2)
    before = start.scales.to(weight.dtype)

    def lost(scales: Tensor) -> Tensor:
        """The error of every row, but for what no scale changes: [n]."""
        pulled = torch.bmm(gram, scales.unsqueeze(2)).squeeze(2) - 2 * right
        return (pulled * scales).double().sum(dim=1)

    least = lost(before)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    ridge = RIDGE * diagonal.mean(dim=1, keepdim=True) + torch.finfo(weight.dtype).tiny
    diagonal.add_(ridge)
    found = torch.linalg.solve_ex(gram, right.unsqueeze(2))[0].squeeze(2)
    diagonal.sub_(ridge)
    grown = found / before
    sane = (found.abs() > SMALLEST) & (grown > 1 / 4) & (grown < 4)
    new = stored(torch.where(sane, found, before), start.scales.dtype, fold, diagonal)
    better = lost(new.to(weight.dtype)) < least
    return torch.where(better.unsqueeze(1), new, start.scales)


def descend(matrix: Tensor, start: QuantizedWeight, scheme: Scheme, slope: Tensor, follow: bool = True) -> Tensor:
    """Visit every column once and give each row the code there that lowers its error most; int8 [n, k].

    With G = (Q - W) H the best change of one entry is -G / H_jj, and any code nearer to it than the present one lowers
    the error, so the nearest in range does. ``slope`` is G^T [k, n]; it follows the codes, in its place, or without
    ``follow`` only as far as the columns to come need it. Columns of one scale go together.
    """
    k = len(matrix)
    widths = start.scales.to(slope.dtype).T.contiguous()  # [groups, n]
    size = k // widths.shape[0]
    codes = start.codes.T.contiguous().to(slope.dtype)  # [k, n]
    code_range = scheme.code_range
    for first, last in columns.spans(k):
        moved = slope.new_empty(last - first, codes.shape[1])
        before = slope[first:last].clone() if follow else None
        for column, stop, end in columns.steps(first, last, COLUMNS, size):  # columns of one scale
            here, part = slice(column, stop), moved[column - first : stop - first]
            if end > stop:
                products.add(slope[stop:end], matrix[stop:end, here], part)
                continue
            bend = matrix[here, here].float()
            part.copy_(columns.descended(slope[here], widths[column // size], bend, codes[here], code_range))
        if before is not None:
            slope[first:last] = before
        told = moved.to(matrix.dtype)
        for begin, end in columns.spans(k, 0 if follow else last):
            products.add(slope[begin:end], matrix[begin:end, first:last], told)
    return codes.to(torch.int8).T.contiguous()


def errors(weight: Tensor, matrix: Tensor, quantized: QuantizedWeight, packed: sweeps.Packed | None = None) -> Tensor:
    """Return (q - w) H (q - w)^T of every row: [n]; ``packed`` is H as sweeps take it."""
    difference = quantized.gap(weight)
    return _times(difference, matrix, packed).mul_(difference).sum(dim=1)


def _times(rows: Tensor, matrix: Tensor, packed: sweeps.Packed | None) -> Tensor:
    return products.times(rows, matrix) if packed is None else sweeps.times(packed, rows)
