"""Alternating least squares: the factors of a butterfly whose product is nearest to a given matrix.

Source: DeBut (Lin et al. 2021). With the products A to the left and C to the right of factor R held fixed,
min |F - A R C| is linear in R's nonzeros at (I, J); its normal equations need only products of the small matrices:
G = (A^T A)[I, I] o (C C^T)[J, J], right side (A^T F C^T)[I, J].
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit.vision import butterfly
from qtoolkit.vision.butterfly import Chain

RIDGE = 1e-10  # relative to the mean diagonal


def fit(matrix: Tensor, chain: Chain, sweeps: int, generator: torch.Generator, root: Tensor | None = None) -> Tensor:
    """Return the flat factors whose product is near ``matrix`` [n, k], in float32.

    Args:
        matrix: the weight.
        chain: shapes of the factors.
        sweeps: passes over all factors, once up and once down each.
        generator: of the random start, uniform in 0..1 as published.
        root: float [k, k] with root root^T = H, the layer's Hessian: minimises the output's error, not the weight's.
    """
    target = matrix.double()
    right = torch.eye(chain[0].q, dtype=torch.float64) if root is None else root.double()
    target = target @ right
    values = [torch.rand(factor.shape, generator=generator, dtype=torch.float64) for factor in chain]
    upward = list(range(len(chain)))
    for _ in range(sweeps):
        for index in upward + upward[::-1]:
            _solve(target, chain, values, index, right)
    return torch.cat([value.flatten() for value in values]).float()


def relative_error(matrix: Tensor, chain: Chain, flat: Tensor) -> float:
    """Return |F - product| / |F| in the Frobenius norm."""
    product = butterfly.dense(chain, butterfly.split(flat, chain))
    return float((matrix - product).norm() / matrix.norm())


def _solve(target: Tensor, chain: Chain, values: list[Tensor], index: int, right: Tensor) -> None:
    factor = chain[index]
    below = right  # C: everything on the input's side, [q, k]
    for other in range(index):
        below = chain[other].dense(values[other]) @ below
    above = torch.eye(factor.p, dtype=torch.float64)  # A: everything on the output's side, [n, p]
    for other in range(index + 1, len(chain)):
        above = chain[other].dense(values[other]) @ above
    outer, inner = above.T @ above, below @ below.T
    wanted = above.T @ target @ below.T  # [p, q]
    rows, columns = (part.view(factor.shape) for part in factor.indices())  # [blocks, r, s, t]
    right_side = wanted[rows, columns]
    if index == len(chain) - 1:  # A is the identity: every row has a system of its own, of its s numbers
        line = columns[:, 0].transpose(1, 2)  # [blocks, t, s]
        gram = inner[line.unsqueeze(3), line.unsqueeze(2)]
        values[index] = _ridge_solve(gram, right_side.permute(0, 3, 2, 1)).permute(0, 3, 2, 1)
    elif index == 0 and _is_identity(right):  # so is C for the first factor: every column has a system of r numbers
        line = rows[:, :, 0].transpose(1, 2)  # [blocks, t, r]
        gram = outer[line.unsqueeze(3), line.unsqueeze(2)]
        values[index] = _ridge_solve(gram, right_side.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    else:
        i, j = rows.flatten(), columns.flatten()
        gram = outer[i][:, i] * inner[j][:, j]
        values[index] = _ridge_solve(gram, right_side.reshape(-1, 1)).view(factor.shape)


def _ridge_solve(gram: Tensor, right_side: Tensor) -> Tensor:
    """Solve [..., m, m] x = [..., m, l]; a random start's normal equations can be singular."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    ridge = RIDGE * diagonal.mean(dim=-1, keepdim=True) + 1e-300
    return torch.linalg.solve(gram + torch.diag_embed(ridge.expand_as(diagonal)), right_side)


def _is_identity(matrix: Tensor) -> bool:
    return torch.equal(matrix, torch.eye(len(matrix), dtype=matrix.dtype))
