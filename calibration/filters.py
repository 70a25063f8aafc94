"""Filter pruning without training: choose filters by a criterion, remove them, and let the readers make up for it.

The channels of a ``ChannelGroup`` disappear from producers and consumers alike, so the packed network is smaller by
just that. Elsewhere (``where: all``) a layer's filters become zeros and its batch norm goes on adding their constant.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from qtoolkit.calibration import criteria
from qtoolkit.calibration.hessian import layer_hessian
from qtoolkit.calibration.options import Options
from qtoolkit.stages import Block, Stream
from qtoolkit.vision.context import VisionContext
from qtoolkit.vision.matrix import Geometry, from_matrix, to_matrix, weight_of


class FiltersOptions(Options):
    """Options of the step ``filters``."""

    criterion: Literal["l2", "fpgm", "taylor", "batchnorm", "ezcrop"] = "l2"
    where: Literal["inner", "all"] = Field("inner", description="inner: only channels that one group alone reads")
    compensate: bool = Field(True, description="refit the readers by least squares on the calibration images")
    damping: float = Field(0.01, gt=0, description="added to the Hessian's diagonal, as a part of its mean")


class Filters:
    """The transform: removes the recipe's part of every target's filters."""

    Options = FiltersOptions

    def __init__(self, options: FiltersOptions) -> None:
        self.options = options

    @torch.no_grad()
    def apply(self, block: Block, stream: Stream, context: VisionContext) -> dict[str, dict[str, float]]:
        """Prune in place; return how many filters went, and the readers' relative squared error."""
        report: dict[str, dict[str, float]] = {}
        block.module.eval()
        inner = {group.producers[0]: group for group in block.groups}
        for name in block.targets:
            if name in block.refused or (name not in inner and self.options.where == "inner"):
                continue
            scores = criteria.scores(block, name, self.options.criterion, stream, context)
            count = int(context.pattern.rate * len(scores))
            removed = torch.zeros(len(scores), dtype=torch.bool)
            removed[scores.argsort()[:count]] = True
            report[name] = {"removed": float(count), "error": 0.0}
            if name in inner and self.options.compensate:
                for consumer in inner[name].consumers:
                    report[name]["error"] = self._refit(block, consumer, removed, stream)
            remove(block, name, removed)
        return report

    def _refit(self, block: Block, consumer: str, removed: Tensor, stream: Stream) -> float:
        """Refit ``consumer`` to its own output without the removed input channels; return the error that stays.

        W' = argmin |W x - W' x_kept|^2, so W' = W H[:, kept] H[kept, kept]^-1 with the layer's Hessian H.
        """
        parameter, geometry = weight_of(block, consumer), Geometry.of(block.layer(consumer))
        hessian = layer_hessian(block, consumer, stream)
        taps = geometry.k // geometry.inputs
        kept = (~removed).repeat(taps).nonzero().flatten()
        weight = to_matrix(parameter.data)
        matrix = hessian.matrix[kept][:, kept]
        matrix = matrix + torch.eye(len(kept)) * (self.options.damping * float(matrix.diagonal().mean()))
        fitted = torch.zeros_like(weight)
        fitted[:, kept] = torch.linalg.solve(matrix, (weight @ hessian.matrix[:, kept]).T).T
        parameter.data = from_matrix(fitted, geometry.shape)
        difference = weight - fitted
        total = float(((weight @ hessian.matrix) * weight).sum())
        return float(((difference @ hessian.matrix) * difference).sum()) / total if total > 0 else 0.0


@torch.no_grad()
def remove(block: Block, name: str, removed: Tensor) -> None:
    """Zero the filters ``removed`` (bool [n]) of layer ``name``; in a group also what follows and reads them.

    With its batch norm's scale and shift zero a removed channel carries 0, not a constant, so that leaving it out
    changes nothing.
    """
    group = next((g for g in block.groups if g.producers[0] == name), None)
    for producer in group.producers if group else (name,):
        for parameter in block.layer(producer).parameters(recurse=False):
            parameter.data[removed] = 0.0
    for consumer in group.consumers if group else ():
        weight_of(block, consumer).data[:, removed] = 0.0
