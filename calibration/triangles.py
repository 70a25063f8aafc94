"""Cholesky factors of large matrices in their own memory, by blocks: most of the work is products, which are fast.

LAPACK does the same, but on the CPUs of one maker only at a third of the speed of oneDNN's products (``products.py``).
A factor lies in the lower triangle alone, so that a symmetric matrix is still there in its upper one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtoolkit.calibration import products

BLOCK = 512  # columns that are factored and solved by the library, for so many rows at a time: it is fast in caches
TINY = 2.0**-100  # of a diagonal
SOLVED = 128  # rows of a triangular matrix that are inverted by a solver


def factor(matrix: Tensor, rough: bool = False) -> bool:
    """Put the Cholesky factor L of symmetric ``matrix`` [k, k] into its lower triangle; False where it is singular.

    The strict upper triangle stays; the lower one is spoilt where there is no factor. ``rough``: products may be, if
    in whole numbers, which gives the factor of a matrix whose entries are off by 2e-4 of their row's and column's
    diagonal; where that is none, an exact one is looked for. Such errors add up along what all inputs have in common:
    there the factor may be off by much, unseen, which changes little of what GPTQ leaves (`evals/LOG.md`).
    """
    with products.in_whole_numbers(rough) as may:
        diagonal = matrix.diagonal().clone() if may else None
        if _factor(matrix):
            return True
    if diagonal is None:
        return False
    mirrored(matrix).diagonal().copy_(diagonal)
    return factor(matrix)


def _factor(matrix: Tensor) -> bool:
    k = len(matrix)
    for first, last in spans(k):
        here, below = matrix[first:last, first:last], matrix[last:, first:last]
        found, failed = torch.linalg.cholesky_ex(here.tril() + here.tril(-1).T)
        if failed or not found.isfinite().all():
            return False
        here.copy_(found + here.triu(1))
        _divide(below, found)
        products.take_square(matrix[last:, last:], below)
    return True


@dataclass(frozen=True)
class Factor:
    """The Cholesky factor of D^-1 C D^-1: C's in the triangle ``lower`` [k, k], and D's diagonal, ``root`` [k]."""

    lower: Tensor
    root: Tensor

    def solved(self, right: Tensor) -> Tensor:
        """Return ``right`` [m, k] times the matrix's inverse, in its place."""
        return solved(self.lower, right.mul_(self.root)).mul_(self.root)


def normalized(matrix: Tensor) -> Tensor:
    """Bring the diagonal of ``matrix`` [k, k] near one, in its place; return what rows and columns are multiplied with.

    These are powers of two [k]: ``scaled`` by their inverses the matrix has its old bits, but for what underflows.
    Whole numbers that stand for a row have one scale: without this the largest inputs would take the others' bits.
    """
    exponents = matrix.diagonal().clamp(TINY, 1 / TINY).log2().mul_(-0.5).round_()
    root = torch.ldexp(torch.ones_like(exponents), exponents.to(torch.int32))
    scaled(matrix, root)
    return root


def scaled(matrix: Tensor, root: Tensor) -> None:
    """Multiply rows and columns of ``matrix`` [k, k] with ``root`` [k], in its place."""
    for rows, own in zip(matrix.split(BLOCK), root.split(BLOCK), strict=True):
        rows.mul_(root).mul_(own.unsqueeze(1))


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
        part = right[:, first:last]
        _divide(part, lower[first:last, first:last].tril())
        told = products.halved(part)
        products.add_beside(right, told, lower[:, first:last].T, blocks[place + 1 :], alpha=-1.0)
    for place, (first, last) in reversed(list(enumerate(blocks))):
        part = right[:, first:last]
        _divide(part, lower[first:last, first:last].tril(), transposed=False)
        told = products.halved(part)
        products.add_beside(right, told, lower[first:last], blocks[:place], alpha=-1.0)
    return right


def _divide(right: Tensor, lower: Tensor, transposed: bool = True) -> None:
    """Put ``right L^-T`` in the place of ``right`` [m, k], or ``right L^-1``, for triangular L [k, k]."""
    divisor = lower.T if transposed else lower
    for part in right.split(BLOCK):
        part.copy_(torch.linalg.solve_triangular(divisor, part, upper=transposed, left=False))


def ordered(matrix: Tensor, order: Tensor) -> Tensor:
    """Return ``matrix`` [k, k] with rows and columns in ``order`` int64 [k]."""
    found = torch.empty_like(matrix)
    for first in range(0, len(matrix), SOLVED):  # rows that caches hold
        rows = order[first : first + SOLVED]
        torch.index_select(matrix[rows], 1, order, out=found[first : first + SOLVED])
    return found


def inverse_factor(matrix: Tensor, rough: bool = False) -> Tensor | None:
    """Return the upper U [k, k] with U^T U the inverse of ``matrix``, or None where it is singular.

    ``matrix`` comes with rows and columns reversed, and is overwritten: its factor's inverse, reversed, is U, and no
    inverse of the matrix is formed. ``rough`` is as in ``factor``.
    """
    root = normalized(matrix) if rough else None
    if not factor(matrix, rough):
        return None
    with products.in_whole_numbers(rough):
        found = _reversed(_inverse(matrix.tril_()))
    return found if root is None else found.mul_(root.flip(0))


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
    """Invert a lower triangular matrix in its place, by blocks of columns from the last on."""
    k = len(lower)
    for first, last in reversed(spans(k)):
        corner = _inverse_corner(lower[first:last, first:last])
        column = products.times(lower[last:, first:last], corner)
        for start, stop in spans(k, last):
            lower[start:stop, first:last] = products.times(lower[start:stop, last:stop], column[: stop - last]).neg_()
    return lower


def _inverse_corner(lower: Tensor) -> Tensor:
    """Invert a small lower triangular matrix in its place, half by half, in products that are as fast as any."""
    k = len(lower)
    if k <= SOLVED:
        return lower.copy_(torch.linalg.solve_triangular(lower, torch.eye(k, device=lower.device), upper=False))
    half = k // 2
    first, last = _inverse_corner(lower[:half, :half]), _inverse_corner(lower[half:, half:])
    corner = lower[half:, :half]
    corner.addmm_(last, corner @ first, beta=0, alpha=-1.0)
    return lower
