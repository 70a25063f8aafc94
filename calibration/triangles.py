"""Cholesky factors of large matrices in their own memory, by blocks: most of the work is products, which are fast.

LAPACK does the same, but on the CPUs of one maker only at a third of the speed of oneDNN's products (``products.py``).
A factor lies in the lower triangle alone, so that a symmetric matrix is still there in its upper one.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 512  # columns that are factored and solved by the library
SOLVED = 128  # rows of a triangular matrix that are inverted by a solver


def factor(matrix: Tensor) -> bool:
    """Put the Cholesky factor L of symmetric ``matrix`` [k, k] into its lower triangle; False where it is singular.

    The strict upper triangle stays; the lower one is spoilt where there is no factor.
    """
    k = len(matrix)
    for first, last in spans(k):
        here, below = matrix[first:last, first:last], matrix[last:, first:last]
        found, failed = torch.linalg.cholesky_ex(here.tril() + here.tril(-1).T)
        if failed or not found.isfinite().all():
            return False
        here.copy_(found + here.triu(1))
        below.copy_(torch.linalg.solve_triangular(found.T, below, upper=True, left=False))
        for start, stop in spans(k, last):
            right = matrix[start:stop, first:last].T
            matrix[start:stop, start:stop].sub_((matrix[start:stop, first:last] @ right).tril_())
            for top, end in spans(k, stop):
                matrix[top:end, start:stop].addmm_(matrix[top:end, first:last], right, alpha=-1.0)
    return True


def spans(k: int, first: int = 0) -> list[tuple[int, int]]:
    """Return the blocks of 0..k from ``first`` on, which begins one: products of one size share what oneDNN makes."""
    return [(start, min(start + BLOCK, k)) for start in range(first, k, BLOCK)]


def mirrored(matrix: Tensor) -> Tensor:
    """Copy the strict upper triangle of ``matrix`` [k, k] over the lower one."""
    for first in range(0, len(matrix), BLOCK):
        last = first + BLOCK
        here = matrix[first:last, first:last]
        here.copy_(here.triu() + here.triu(1).T)
        matrix[last:, first:last] = matrix[first:last, last:].T
    return matrix


def solved(lower: Tensor, right: Tensor) -> Tensor:
    """Return ``right (L L^T)^-1`` [m, k] in the place of ``right``, for L in the lower triangle of ``lower`` [k, k]."""
    blocks = spans(len(lower))
    for place, (first, last) in enumerate(blocks):
        part, corner = right[:, first:last], lower[first:last, first:last]
        for start, stop in blocks[:place]:
            part.addmm_(right[:, start:stop], lower[first:last, start:stop].T, alpha=-1.0)
        part.copy_(torch.linalg.solve_triangular(corner.tril().T, part, upper=True, left=False))
    for place, (first, last) in reversed(list(enumerate(blocks))):
        part, corner = right[:, first:last], lower[first:last, first:last]
        for start, stop in blocks[place + 1 :]:
            part.addmm_(right[:, start:stop], lower[start:stop, first:last], alpha=-1.0)
        part.copy_(torch.linalg.solve_triangular(corner.tril(), part, upper=False, left=False))
    return right


def inverse_factor(matrix: Tensor) -> Tensor | None:
    """Return the upper U [k, k] with U^T U the inverse of ``matrix``, or None where it is singular.

    ``matrix`` comes with rows and columns reversed, and is overwritten: its factor's inverse, reversed, is U, and no
    inverse of the matrix is formed.
    """
    return _reversed(_inverse(matrix.tril_())) if factor(matrix) else None


def _reversed(matrix: Tensor) -> Tensor:
    """Reverse rows and columns of a square matrix in its place."""
    k = len(matrix)
    for first in range(0, (k + 1) // 2, SOLVED):
        last = min(first + SOLVED, (k + 1) // 2)
        upper, lower = (part.flip(0, 1) for part in (matrix[first:last], matrix[k - last : k - first]))
        matrix[first:last] = lower
        matrix[k - last : k - first] = upper
    return matrix


def _inverse(lower: Tensor) -> Tensor:
    """Invert a lower triangular matrix in its place, half by half, in products that are as fast as any."""
    k = len(lower)
    if k <= SOLVED:
        return lower.copy_(torch.linalg.solve_triangular(lower, torch.eye(k, device=lower.device), upper=False))
    half = k // 2
    first, last = _inverse(lower[:half, :half]), _inverse(lower[half:, half:])
    corner = lower[half:, :half]
    corner.addmm_(last, corner @ first, beta=0, alpha=-1.0)
    return lower
