"""Deformable butterflies: a matrix as a product of factors whose nonzeros sit on diagonals of blocks.

Source: DeBut (Lin et al. 2021). A factor R^(p,q)_(r,s,t) is a p x q block-diagonal matrix; each block is an r x s grid
of t x t diagonal matrices, so it has p * s nonzeros. A chain lists its factors from the input's side to the output's.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factor:
    """One factor: p outputs, q inputs, blocks of an r x s grid of t x t diagonals."""

    p: int
    q: int
    r: int
    s: int
    t: int

    def __post_init__(self) -> None:
        if min(self.p, self.q, self.r, self.s, self.t) < 1 or self.q % (self.s * self.t) or self.p % (self.r * self.t):
            raise ValueError(f"p, q and the grid do not divide: {self}")
        if self.p // (self.r * self.t) != self.q // (self.s * self.t):
            raise ValueError(f"outputs and inputs have different numbers of blocks: {self}")

    @property
    def blocks(self) -> int:
        """Return how many diagonal blocks there are."""
        return self.q // (self.s * self.t)

    @property
    def nonzeros(self) -> int:
        """Return how many numbers are stored."""
        return self.p * self.s

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Return the shape of the stored numbers: [blocks, r, s, t]."""
        return self.blocks, self.r, self.s, self.t

    def indices(self) -> tuple[Tensor, Tensor]:
        """Return row and column of every nonzero in storage order: int64 [nonzeros] each."""
        b, r, s, t = torch.meshgrid(*(torch.arange(size) for size in self.shape), indexing="ij")
        return ((b * self.r + r) * self.t + t).flatten(), ((b * self.s + s) * self.t + t).flatten()

    def dense(self, values: Tensor) -> Tensor:
        """Return the factor as a matrix [p, q] of its values [blocks, r, s, t]."""
        matrix = values.new_zeros(self.p, self.q)
        rows, columns = self.indices()
        matrix[rows, columns] = values.flatten()
        return matrix

    def apply(self, x: Tensor, values: Tensor) -> Tensor:
        """Return [places, p] of x [places, q]."""
        split = x.view(-1, self.blocks, self.s, self.t)
        return torch.einsum("xbst,brst->xbrt", split, values).reshape(-1, self.p)


Chain = tuple[Factor, ...]


def chain(q: int, grids: tuple[tuple[int, int, int], ...]) -> Chain:
    """Return the factors with ``grids`` (r, s, t) from the input's side on for q inputs.

    Raises:
        ValueError: a grid does not divide what is left, or the chain does not make a dense matrix (t_1 = 1,
            t_{i+1} = r_i t_i, and the last factor has one block).
    """
    factors: list[Factor] = []
    expected = 1
    for r, s, t in grids:
        if t != expected:
            raise ValueError(f"the product would have zeros: t is {t}, must be {expected}")
        if q % s:
            raise ValueError(f"{s} does not divide {q} channels")
        factors.append(Factor(q * r // s, q, r, s, t))
        q, expected = factors[-1].p, r * t
    if factors[-1].blocks != 1:
        raise ValueError(f"the product would have zeros: the last factor has {factors[-1].blocks} blocks, must have 1")
    return tuple(factors)


def nonzeros(factors: Chain) -> int:
    """Return how many numbers the chain stores."""
    return sum(factor.nonzeros for factor in factors)


def layer_compression(factors: Chain) -> float:
    """Return LC, the part of the dense matrix's numbers that the chain saves."""
    return 1 - nonzeros(factors) / (factors[-1].p * factors[0].q)


def split(flat: Tensor, factors: Chain) -> list[Tensor]:
    """Return the values of every factor, [blocks, r, s, t] each, of the flat storage [nonzeros]."""
    parts = flat.split([factor.nonzeros for factor in factors])
    return [part.view(factor.shape) for part, factor in zip(parts, factors, strict=True)]


def apply(x: Tensor, factors: Chain, values: list[Tensor]) -> Tensor:
    """Return [places, p] of x [places, q]: one factor after the other."""
    for factor, part in zip(factors, values, strict=True):
        x = factor.apply(x, part)
    return x


def dense(factors: Chain, values: list[Tensor]) -> Tensor:
    """Return the product as a matrix [p, q]."""
    matrix = factors[0].dense(values[0])
    for factor, part in zip(factors[1:], values[1:], strict=True):
        matrix = factor.dense(part) @ matrix
    return matrix


def parse(text: str, q: int) -> Chain:
    """Read a chain written as ``8x25x1 2x2x8 2x2x16``: r x s x t of every factor from the input's side on.

    Raises:
        ValueError: not of that form, or not a chain for q inputs.
    """
    grids = []
    for word in text.split():
        numbers = word.split("x")
        if len(numbers) != 3 or not all(number.isdecimal() for number in numbers):
            raise ValueError(f"{word!r} is not of the form RxSxT")
        grids.append((int(numbers[0]), int(numbers[1]), int(numbers[2])))
    if not grids:
        raise ValueError("the chain is empty")
    return chain(q, tuple(grids))


def text(factors: Chain) -> str:
    """Return the chain as ``parse`` reads it."""
    return " ".join(f"{factor.r}x{factor.s}x{factor.t}" for factor in factors)


def initial_scale(factors: Chain) -> float:
    """Return the standard deviation of a factor's numbers that keeps the variance of what passes through the chain."""
    return float(prod(factor.s for factor in factors)) ** (-0.5 / len(factors))
