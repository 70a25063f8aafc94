"""The Hessian of a layer's output error, accumulated over calibration batches in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qtoolkit.calibration import products, triangles
from qtoolkit.stages import Block, Stream
from qtoolkit.vision.matrix import Geometry

SHRUNK = 0.1  # from which it is factored with rounded products: most eigenvalues are far above what these change
PART, PARTS = 128, 8  # rows that are summed together, at least, and of how many parts
NARROW = 1024  # inputs below which parts pay: oneDNN keeps 400 MB for all the sizes of a wide layer's parts
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
        self._matrix = torch.empty(k, k, device=device)
        self._blank = True  # nothing was written there: it stands for zeros
        self._whole = True  # what is below the diagonal is there, too
        self.mean = torch.zeros(k, device=device)
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """Add inputs x [tokens, k]."""
        seen = self.tokens + x.shape[0]
        k = len(self._matrix)
        rows = max(PART, k // PARTS) if k < NARROW and not products.skips_lower() else k
        for first in range(0, k, rows):  # nothing below the diagonal: half the work
            here = slice(first, first + rows)
            part, kept = self._matrix[here, first:], self.tokens / seen
            products.accumulated(part, x[:, here].T, x[:, first:], keep=kept, share=2.0 / seen, half="upper")
        self._blank = self._whole = False
        self.mean.mul_(self.tokens / seen).add_(x.sum(dim=0), alpha=1.0 / seen)
        self.tokens = seen

    @property
    def matrix(self) -> Tensor:
        """Return H [k, k] itself, which may be changed for a while."""
        with torch.inference_mode():  # where the inputs may have been added, too
            if self._blank:
                self._matrix.zero_()
            elif not self._whole:
                triangles.mirrored(self._matrix)
        self._blank, self._whole = False, True
        return self._matrix

    @property
    def dead(self) -> Tensor:
        """Return which inputs were always zero: bool [k]. Nothing is known of them."""
        return (self.matrix if self._blank else self._matrix).diagonal() == 0

    def diagonal(self, damping: float) -> Tensor:
        """Return the shrunk diagonal [k] and ``damping`` times its mean; an input that was always zero has one."""
        found = self.matrix.diagonal() + self.dead
        return (found + damping * float(found.mean())) / (1 - self.shrinkage)

    @property
    def may_be_rough(self) -> bool:
        """Tell whether its factor may be made of rounded products."""
        return self.shrinkage >= SHRUNK

    @contextmanager
    def under(self, damping: float) -> Iterator[Tensor]:
        """Inside, the matrix itself has the diagonal of ``damping``: no other of its size is made."""
        before = self.matrix.diagonal().clone()
        self.matrix.diagonal().copy_(self.diagonal(damping))
        try:
            yield self.matrix
        finally:
            self.matrix.diagonal().copy_(before)

    @contextmanager
    def factored(self, damping: float) -> Iterator[triangles.Factor | None]:
        """Inside, the matrix's lower triangle is its Cholesky factor, under ``damping``; None: it is singular."""
        with self.under(damping) as matrix:
            root = triangles.normalized(matrix)
            try:
                found = triangles.factor(matrix, rough=self.may_be_rough)
                yield triangles.Factor(matrix, root) if found else None
            finally:
                triangles.scaled(triangles.mirrored(matrix), 1 / root)


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
