"""Filter pruning without training: choose filters by a criterion, remove them, and let the readers make up for it.

The channels of a ``ChannelGroup`` disappear from producers and consumers alike, so the packed network is smaller by
just that. Our own networks name their groups, those of transformers are traced (``qtoolkit.vision.dependencies``).
Elsewhere (``where: all``) a layer's filters become zeros and its batch norm goes on adding their constant.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from qtoolkit.calibration import criteria
from qtoolkit.calibration.hessian import layer_hessian
from qtoolkit.calibration.options import Options
from qtoolkit.errors import RequestError
from qtoolkit.stages import Block, ChannelGroup, Stream
from qtoolkit.vision.context import VisionContext
from qtoolkit.vision.matrix import Geometry, from_matrix, to_matrix, weight_of

Where = Literal["inner", "coupled", "all"]


class FiltersOptions(Options):
    """Options of the step ``filters``."""

    criterion: Literal["l2", "fpgm", "taylor", "batchnorm", "ezcrop"] = "l2"
    where: Where = Field("inner", description="inner: channels of one layer; coupled: also sums and heads; all: zeros")
    compensate: bool = Field(True, description="refit the readers by least squares on the calibration images")
    damping: float = Field(0.01, gt=0, description="added to the Hessian's diagonal, as a part of its mean")


class Filters:
    """The transform: removes the recipe's part of every group's channels."""

    Options = FiltersOptions

    def __init__(self, options: FiltersOptions) -> None:
        self.options = options

    @torch.no_grad()
    def apply(self, block: Block, stream: Stream, context: VisionContext) -> dict[str, dict[str, float]]:
        """Prune in place; return how many filters went, and the readers' worst relative squared error.

        Raises:
            RequestError: the recipe's pattern is not ``filter``, or the network has no such channels.
        """
        if context.pattern.kind != "filter":
            raise RequestError(f"The step filters cannot make the pattern {context.pattern.name}.")
        report: dict[str, dict[str, float]] = {}
        block.module.eval()
        for group in chosen(block, self.options.where, context):
            scores = criteria.scores(block, group, self.options.criterion, stream, context)
            count = int(context.pattern.rate * len(scores))
            removed = torch.zeros(len(scores), dtype=torch.bool)
            removed[scores.argsort()[:count]] = True
            removed = removed.repeat_interleave(group.unit)
            errors = [0.0]
            if self.options.compensate:
                errors += [self._refit(block, consumer, removed, stream) for consumer in group.consumers]
            for name in criteria.made_by(block, group):
                report[name] = {"removed": float(removed.sum()), "error": max(errors)}
            remove(block, group, removed)
        return report

    def _refit(self, block: Block, consumer: str, removed: Tensor, stream: Stream) -> float:
        """Refit ``consumer`` to its own output without the removed input channels; return the error that stays.

        W' = argmin |W x - W' x_kept|^2, so W' = W H[:, kept] H[kept, kept]^-1 with the layer's Hessian H. A layer with
        a bias is refitted to what varies, and its bias takes up the constant that the removed channels carried; the
        others leave it to the batch norm behind them.
        """
        layer: Any = block.layer(consumer)
        parameter, geometry = weight_of(block, consumer), Geometry.of(layer)
        hessian = layer_hessian(block, consumer, stream)
        mean = hessian.mean if layer.bias is not None else torch.zeros_like(hessian.mean)
        moments = hessian.matrix - 2 * torch.outer(mean, mean)
        taps = geometry.k // geometry.inputs
        kept = (~removed).repeat(taps).nonzero().flatten()
        weight = to_matrix(parameter.data)
        matrix = moments[kept][:, kept]
        matrix = matrix + torch.eye(len(kept)) * (self.options.damping * float(matrix.diagonal().mean()))
        fitted = torch.zeros_like(weight)
        fitted[:, kept] = torch.linalg.solve(matrix, (weight @ moments[:, kept]).T).T
        difference = weight - fitted
        if layer.bias is not None:
            layer.bias.data += difference @ mean
        parameter.data = from_matrix(fitted, geometry.shape)
        total = float(((weight @ moments) * weight).sum())
        return float(((difference @ moments) * difference).sum()) / total if total > 0 else 0.0


def chosen(block: Block, where: Where, context: VisionContext) -> list[ChannelGroup]:
    """Return the groups that lose channels; with ``all`` every other layer is a group that nobody reads.

    Raises:
        RequestError: there are none.
    """
    found = [
        group
        for group in block.groups
        if not any(name in block.refused for name in group.producers)
        and (where != "inner" or len(criteria.made_by(block, group)) == 1)
    ]
    if where == "all":
        grouped = {name for group in block.groups for name in group.producers}
        alone = [n for n in block.targets if n not in {*grouped, *block.refused, *context.architecture.keep}]
        found += [ChannelGroup(name, (name,), ()) for name in alone]
    if not found:
        raise RequestError(f"This network has no channels of the kind {where!r} to remove.", "Choose where=all.")
    return found


@torch.no_grad()
def remove(block: Block, group: ChannelGroup, removed: Tensor) -> None:
    """Zero the channels ``removed`` (bool [n]) in everything that writes, follows or reads them.

    With its batch norm's scale and shift zero a removed channel carries 0, not a constant, so that leaving it out
    changes nothing. A group without readers keeps that constant.
    """
    for producer in group.producers:
        for parameter in block.layer(producer).parameters(recurse=False):
            parameter.data[removed] = 0.0
    for consumer in group.consumers:
        weight_of(block, consumer).data[:, removed] = 0.0
