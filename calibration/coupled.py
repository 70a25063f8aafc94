"""Rounding under a metric of the outputs: the codes of a head's outputs are chosen together, not row by row.

The error is tr(B (Q - W) H (Q - W)^T), block by block of B, one block a head. Compensation still runs over the columns,
which takes care of H; inside a column the rows of a head are rounded one after another, each making up for those before
it as B says (the same elimination, on the other side), all heads at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit.calibration.refine import COLUMNS, refitted_scales
from qtoolkit.scheme import Scheme
from qtoolkit.stages import QuantizedWeight


class Column:
    """Rounds one column of a weight [n], n = heads x head_dim, under ``metric`` [heads, head_dim, head_dim]."""

    def __init__(self, metric: Tensor, scheme: Scheme) -> None:
        self.heads, self.size, _ = metric.shape
        self.range = scheme.code_range
        lower = torch.linalg.cholesky(metric)
        upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
        spread = upper / upper.diagonal(dim1=1, dim2=2).unsqueeze(2)
        self.spread = spread.permute(1, 2, 0).contiguous()  # [row, later row, head]

    def __call__(self, column: Tensor, steps: Tensor) -> Tensor:
        """Return the codes, float32 [n], of ``column`` [n] on a grid with ``steps`` [n]."""
        rest = column.view(self.heads, self.size).T.contiguous()  # [row, head]
        widths = steps.view(self.heads, self.size).T.contiguous()
        codes = torch.empty_like(rest)
        for row in range(self.size):
            torch.div(rest[row], widths[row], out=codes[row])
            codes[row].round_().clamp_(*self.range)
            lost = rest[row] - codes[row] * widths[row]
            rest[row + 1 :].sub_(self.spread[row, row + 1 :] * lost)
        return codes.T.reshape(-1)


def refined(
    weight: Tensor, matrix: Tensor, metric: Tensor, start: QuantizedWeight, scheme: Scheme, rounds: int
) -> QuantizedWeight:
    """Return codes and scales with at most the error of ``start`` in every head; see ``refine.refined``."""
    best, size = start, metric.shape[1]
    for _ in range(rounds):
        scaled = QuantizedWeight(best.codes, refitted_scales(weight, matrix, best, scheme))
        better = errors(weight, matrix, metric, scaled) < errors(weight, matrix, metric, best)
        rows = better.repeat_interleave(size).unsqueeze(1)
        scaled = QuantizedWeight(best.codes, torch.where(rows, scaled.scales, best.scales))
        best = QuantizedWeight(descend(weight, matrix, metric, scaled, scheme), scaled.scales)
    return best


def descend(weight: Tensor, matrix: Tensor, metric: Tensor, start: QuantizedWeight, scheme: Scheme) -> Tensor:
    """Visit every entry once and give it the code that lowers the error most; int8 [n, k].

    With G = B (Q - W) H the best change of entry (r, j) is -G_rj / (B_rr H_jj).
    """
    n, k = weight.shape
    heads, size, _ = metric.shape
    scales = start.scales.to(weight.dtype).T.contiguous()  # [groups, n]
    group = k // scales.shape[0]
    codes = start.codes.T.to(weight.dtype).contiguous()  # [k, n]
    lost = codes * scales.repeat_interleave(group, dim=0) - weight.T
    gradient = _times(matrix @ lost, metric)  # [k, n]
    curve = metric.diagonal(dim1=1, dim2=2).T.contiguous()  # [row, head]
    coupling = metric.permute(1, 2, 0).contiguous()  # [row, other row, head]
    for first in range(0, k, COLUMNS):
        last = min(first + COLUMNS, k)
        near, moved = gradient[first:last], weight.new_zeros(last - first, n)
        for column in range(first, last):
            local, stiff = column - first, matrix[column, column]
            slope = near[local].view(heads, size).T.contiguous()
            widths = scales[column // group].view(heads, size).T.contiguous()
            now = codes[column].view(heads, size).T.contiguous()
            change = torch.empty_like(now)
            for row in range(size):
                new = (now[row] - slope[row] / (widths[row] * curve[row] * stiff)).round_().clamp_(*scheme.code_range)
                change[row] = (new - now[row]) * widths[row]
                now[row] = new
                slope.add_(coupling[row] * (change[row] * stiff))
            codes[column] = now.T.reshape(-1)
            moved[local] = _times(change.T.reshape(1, -1), metric)
            near.addr_(matrix[first:last, column], moved[local])
        gradient[last:].addmm_(matrix[last:, first:last], moved)
    return codes.T.to(torch.int8).contiguous()


def errors(weight: Tensor, matrix: Tensor, metric: Tensor, quantized: QuantizedWeight) -> Tensor:
    """Return tr(B D H D^T) of every head for D = Q - W: [heads]."""
    difference = quantized.dequantize() - weight
    heads = metric.shape[0]
    bent = metric @ (difference @ matrix).view(heads, metric.shape[1], -1)
    return (bent * difference.view_as(bent)).sum(dim=(1, 2))


def _times(x: Tensor, metric: Tensor) -> Tensor:
    """Return x [m, n] with every head's part multiplied by its metric."""
    heads, size, _ = metric.shape
    return torch.einsum("mhi,hij->mhj", x.view(-1, heads, size), metric).reshape(x.shape)
