"""A block of columns whose codes are decided one after another: by the native loops where they run, else by torch.

Here, and not among the calibration stage's files, which do without kernels: as for layers, the core chooses.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qtoolkit.kernels.cpu.rounding import library as native

TOGETHER = 1024  # columns decided before those behind them are told, in products of one size


def spans(k: int, first: int = 0) -> list[tuple[int, int]]:
    """Return the stretches of ``TOGETHER`` columns of 0..k from ``first`` on, which begins one."""
    return [(start, min(start + TOGETHER, k)) for start in range(first, k, TOGETHER)]


def steps(first: int, last: int, most: int, size: int = 0) -> Iterator[tuple[int, int, int]]:
    """Yield in which order the columns of a stretch are decided and told what others have left.

    (a, b, b) says to decide the columns from a on up to b, (a, b, c) to tell those from b on up to c of those. Halves
    are told of halves, their halves of each other: as little work as column by column, in few and large products.

    Args:
        first: the stretch's first column.
        last: behind its last one.
        most: columns that are decided at once.
        size: of a group, no two of which are decided at once; 0: there are none.
    """
    count, width = last - first, most
    border = (first // size + 1) * size if size else last
    if count <= most and border >= last:
        yield first, last, last
        return
    while 2 * width < count:
        width *= 2
    middle = first + width if count > most else border
    yield from steps(first, middle, most, size)
    yield first, middle, last
    yield from steps(middle, last, most, size)


def rounded(
    weight: Tensor, steps: Tensor, groups: Tensor, spread: Tensor, code_range: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return the codes of a block and what rounding left of it; every column makes up for those before.

    Args:
        weight: float32 [columns, n], a column of the weight in each row.
        steps: float32 [groups, n], the scales.
        groups: int64 [columns], the group of each column.
        spread: float32 [columns, at least columns]: entry (i, j) times what column i left is taken from column j > i.
        code_range: least and largest code.

    Returns:
        int8 or float32 codes, and float32, both [columns, n].
    """
    columns = len(weight)
    spread = spread[:, :columns]
    if native.runs(weight.device, columns):
        return native.round_columns(weight, steps, groups, spread.T, code_range)
    work, widths = weight.clone(), steps[groups]
    codes, lost = torch.empty_like(work), torch.empty_like(work)
    rows = zip(*(each.unbind() for each in (work, widths, codes, lost)), strict=True)
    others = zip(spread.unsqueeze(2).unbind(), lost.unsqueeze(1).unbind(), strict=True)  # [columns, 1] and [1, n]
    for i, ((row, width, code, error), (shares, by)) in enumerate(zip(rows, others, strict=True), 1):
        torch.div(row, width, out=code).round_().clamp_(*code_range)
        torch.addcmul(row, code, width, value=-1.0, out=error)
        work[i:].addcmul_(shares[i:], by, value=-1.0)
    return codes, lost


def descended(slope: Tensor, step: Tensor, matrix: Tensor, codes: Tensor, code_range: tuple[int, int]) -> Tensor:
    """Give every column of a block in turn the code that lowers its error most; return how far the weights moved.

    Args:
        slope: float32 [columns, n], dense: the gradient before any of them moves.
        step: float32 [n], the scale of all of them.
        matrix: float32 [columns, columns], how they bend the error: the Hessian among them.
        codes: float32 [columns, n], dense; they become the new ones.
        code_range: least and largest code.

    Returns:
        float32 [columns, n].
    """
    bend = matrix.diagonal()
    spread = matrix / bend.unsqueeze(1)
    if native.runs(codes.device, len(codes)):
        return native.descend_columns(slope, step, bend, spread, codes, code_range)
    wishes = torch.addcdiv(codes, slope, bend.unsqueeze(1) * step, value=-1.0)  # each without the others
    new, moved = torch.empty_like(wishes), torch.empty_like(wishes)
    rows = zip(*(each.unbind() for each in (wishes, codes, new, moved)), strict=True)
    pulls = zip(spread.T.unsqueeze(2).unbind(), moved.unsqueeze(1).unbind(), strict=True)
    for i, ((wish, code, to, move), (others, by)) in enumerate(zip(rows, pulls, strict=True), 1):
        torch.round(wish, out=to).clamp_(*code_range)
        torch.sub(to, code, out=move)
        wishes[i:].addcmul_(others[i:], by, value=-1.0)  # [columns to come, 1] and [1, n]
    codes.copy_(new)
    return moved.mul_(step)
