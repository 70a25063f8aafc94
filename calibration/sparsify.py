"""One-shot sparsity without training: N:M or 1xN blocks by magnitude, or by Hessian compensation (SparseGPT).

Source of the compensated form: SparseGPT (Frantar and Alistarh 2023): a column's removal is judged by
w^2 / [H^-1]_jj at the moment it is reached, and the columns still to come make up for it.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from qtoolkit.calibration import projections
from qtoolkit.calibration.compensation import CompensateOptions, Solved
from qtoolkit.calibration.hessian import layer_hessian
from qtoolkit.calibration.options import Options
from qtoolkit.calibration.sweep import COLUMNS, sweep
from qtoolkit.errors import RequestError
from qtoolkit.stages import Block, Stream
from qtoolkit.vision.context import VisionContext
from qtoolkit.vision.matrix import Geometry, from_matrix, to_matrix, weight_of


class SparsifyOptions(Options):
    """Options of the step ``sparsify``."""

    compensate: bool = Field(True, description="false: by magnitude alone")
    damping: float = Field(0.01, gt=0, description="added to the Hessian's diagonal, as a part of its mean")


class Sparsify:
    """The transform: gives every target the pattern, in the order in which images pass through the layers."""

    Options = SparsifyOptions

    def __init__(self, options: SparsifyOptions) -> None:
        self.options = options

    @torch.no_grad()  # not inference mode: a later step may train the weights
    def apply(self, block: Block, stream: Stream, context: VisionContext) -> dict[str, dict[str, float]]:
        """Sparsify in place; return each target's relative squared output error on the calibration images.

        Raises:
            RequestError: the recipe's pattern is not a sparse one.
        """
        if context.pattern.kind not in ("nm", "block"):
            raise RequestError(f"The step sparsify cannot make the pattern {context.pattern.name}.")
        if self.options.compensate and context.pattern.kind != "nm":
            raise RequestError("Compensation needs an N:M pattern.", "Add --set sparsify.compensate=false.")
        report = {}
        block.module.eval()
        for name in block.targets:
            if name in block.refused:
                continue
            parameter, geometry = weight_of(block, name), Geometry.of(block.layer(name))
            with torch.inference_mode():  # as the Hessian's matrix was summed, which solving changes in its place
                solved = Solved(layer_hessian(block, name, stream), _options(self.options))
            dense = to_matrix(parameter.data)
            if solved.factor is None:
                mask = projections.mask(parameter.data, context.pattern)
                sparse = to_matrix(parameter.data * mask)
            else:
                assert isinstance(solved.factor, torch.Tensor)  # nothing is rough here
                sparse = prune_in_order(dense.masked_fill(solved.dead, 0.0), solved.factor, *context.pattern.nm)
            report[name] = {"error": solved.relative_error(dense, sparse - dense), "damping": solved.damping}
            parameter.data = from_matrix(sparse, geometry.shape)
        return report


def prune_in_order(weight: Tensor, factor: Tensor, kept: int, size: int) -> Tensor:
    """Return weight [n, k] with ``kept`` nonzeros in every block of ``size`` inputs, the others compensated.

    Args:
        weight: float32 [n, k].
        factor: float32 [k, k], upper Cholesky factor of the inverse Hessian.
        kept: N of the pattern.
        size: M of the pattern; k must be a multiple of it.
    """
    work = weight.T.contiguous()  # [k, n]
    diagonal = factor.diagonal().unsqueeze(1)
    keep = torch.zeros_like(work, dtype=torch.bool)

    def decide(column: int, rest: Tensor) -> Tensor:
        if column % size == 0:  # the block's mask is chosen when its first column is reached
            scores = (rest[:size] / diagonal[column : column + size]) ** 2
            chosen = scores.topk(kept, dim=0).indices
            keep[column : column + size].scatter_(0, chosen, True)
        return rest[0] * keep[column]

    sweep(work, factor, decide, columns=max(size, COLUMNS // size * size))
    return work.T.contiguous()


def _options(options: SparsifyOptions) -> CompensateOptions:
    return CompensateOptions(compensate=options.compensate, scale_search=False, damping=options.damping)
