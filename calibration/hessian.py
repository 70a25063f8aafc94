"""The Hessian of a layer's output error, accumulated over calibration batches in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qtoolkit.stages import Block, Stream
from qtoolkit.vision.matrix import Geometry

SOLVED = 128  # rows of a triangular matrix that are inverted by a solver
TOKENS = 131072  # inputs a convolution's Hessian is made of: over 200 for each of 576 rows


class Hessian:
    """Running ``H = 2 / tokens * sum x x^T`` of one layer's inputs, float32 [k, k], and their mean [k].

    ``shrinkage`` s, of 0 to 1, is how little a solver trusts what inputs had in common on this text: under it they see
    ``(1 - s) H + s diag(H)``, as a multiple that leaves H beside the diagonal. Other text has other correlations; the
    size of each input changes less. Source: shrinkage to the diagonal (Ledoit and Wolf 2004; Schäfer and Strimmer 2005,
    target D).
    """

    def __init__(self, k: int, device: torch.device | None = None, shrinkage: float = 0.0) -> None:
        self.shrinkage = shrinkage
        self.matrix = torch.zeros(k, k, device=device)
        self.mean = torch.zeros(k, device=device)
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """Add inputs x [tokens, k]."""
        seen = self.tokens + x.shape[0]
        self.matrix.mul_(self.tokens / seen).addmm_(x.T, x, alpha=2.0 / seen)
        self.mean.mul_(self.tokens / seen).add_(x.sum(dim=0), alpha=1.0 / seen)
        self.tokens = seen

    def merge(self, other: Hessian) -> None:
        """Add the inputs that ``other`` has seen."""
        seen = self.tokens + other.tokens
        if other.tokens:
            self.matrix.mul_(self.tokens / seen).add_(other.matrix, alpha=other.tokens / seen)
            self.mean.mul_(self.tokens / seen).add_(other.mean, alpha=other.tokens / seen)
            self.tokens = seen

    @property
    def dead(self) -> Tensor:
        """Return which inputs were always zero: bool [k]. Nothing is known of them."""
        return self.matrix.diagonal() == 0

    def diagonal(self, damping: float) -> Tensor:
        """Return the shrunk diagonal [k] and ``damping`` times its mean; an input that was always zero has one."""
        found = self.matrix.diagonal() + self.dead
        return (found + damping * float(found.mean())) / (1 - self.shrinkage)

    def damped(self, damping: float) -> Tensor:
        """Return the matrix with the diagonal of ``damping``."""
        matrix = self.matrix.clone()
        matrix.diagonal().copy_(self.diagonal(damping))
        return matrix

    @contextmanager
    def under(self, damping: float) -> Iterator[Tensor]:
        """Inside, the matrix itself has the diagonal of ``damping``: no other of its size is made."""
        before = self.matrix.diagonal().clone()
        self.matrix.diagonal().copy_(self.diagonal(damping))
        try:
            yield self.matrix
        finally:
            self.matrix.diagonal().copy_(before)


def factored(matrix: Tensor) -> Tensor | None:
    """Return the lower Cholesky factor of ``matrix`` [k, k], symmetric, in its place; None where it is singular."""
    place = matrix.T  # column by column, as the solver wants it: then it needs no copy
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(place, out=(place, failed))
    return None if failed else place


def inverse_factor(matrix: Tensor) -> Tensor | None:
    """Return the upper U [k, k] with U^T U the inverse of ``matrix``, or None where it is singular.

    ``matrix`` comes with rows and columns reversed, and is overwritten: its factor's inverse, reversed, is U, and no
    inverse of the matrix is formed.
    """
    lower = factored(matrix)
    return None if lower is None else _reversed(_inverse(lower))


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
    lower[half:, :half] = (last @ lower[half:, :half] @ first).neg_()
    return lower


def shared_inputs(block: Block) -> dict[str, list[str]]:
    """Return which targets read the same input: first target of each set to all of the set."""
    wanted = [name for name, _ in block.linears()]
    sets: dict[str, list[str]] = {}
    for name in wanted:
        group = next((g for g in block.groups if name in g.consumers), None)
        mates = [other for other in wanted if group and other in group.consumers] or [name]
        sets[mates[0]] = mates
    return sets


@torch.inference_mode()
def layer_hessian(block: Block, name: str, stream: Stream, tokens: int = TOKENS) -> Hessian:
    """Return the Hessian of layer ``name`` alone, in float, from the front of the stream up to ``tokens`` inputs.

    The block stops at the layer, so that a network pruned layer by layer is run no further than needed.
    """
    geometry = Geometry.of(block.layer(name))
    hessian = Hessian(geometry.k)

    def catch(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        hessian.update(geometry.patches(args[0]))
        raise _Seen

    handle = block.layer(name).register_forward_pre_hook(catch)
    try:
        for hidden, kwargs in stream.calls():
            if hessian.tokens >= tokens:
                break
            try:
                block.module(hidden, **kwargs)
            except _Seen:
                continue
    finally:
        handle.remove()
    return hessian


class _Seen(Exception):
    """Ends a forward pass at the layer that is looked at."""
