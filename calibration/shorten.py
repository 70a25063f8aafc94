"""Whole residual blocks are left out where they do not bring classes further apart (modularity, Lu et al. 2022)."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor, nn

from qtoolkit.calibration.options import Options
from qtoolkit.errors import RequestError
from qtoolkit.stages import Block, ChannelGroup, Stream
from qtoolkit.vision import similarity
from qtoolkit.vision.context import VisionContext
from qtoolkit.vision.data import normalise


class ShortenOptions(Options):
    """Options of the step ``shorten``."""

    count: int = Field(1, ge=1, description="blocks to leave out: those that raise the modularity least")
    images: int = Field(256, ge=8, description="training images on which it is measured")


class Shorten:
    """The transform: puts an identity in the place of residual blocks."""

    Options = ShortenOptions

    def __init__(self, options: ShortenOptions) -> None:
        self.options = options

    @torch.no_grad()
    def apply(self, block: Block, stream: Stream, context: VisionContext) -> dict[str, dict[str, float]]:
        """Shorten in place; return every residual block's modularity before and behind it, and whether it went.

        Raises:
            RequestError: the network has no more than ``count`` blocks that can be left out.
        """
        images = context.training.first(self.options.images)
        x = normalise(images.x, context.architecture)
        names = residual(block.module, x[:2])
        if len(names) <= self.options.count:
            raise RequestError(
                f"Of {len(names)} blocks that can be left out, {self.options.count} are to go.", "Lower shorten.count."
            )
        around = list(_around(block.module, names, x, images.y))
        gains = torch.tensor([behind - before for before, behind in around])
        leaving = {names[index] for index in gains.argsort()[: self.options.count].tolist()}
        for name in leaving:
            block.module.set_submodule(name, nn.Identity())
        inside = tuple(f"{name}." for name in leaving)
        block.targets = tuple(name for name in block.targets if not name.startswith(inside))
        block.groups = tuple(group for old in block.groups if (group := _without(old, inside)) is not None)
        return {
            name: {"modularity_before": before, "modularity_behind": behind, "left_out": float(name in leaving)}
            for name, (before, behind) in zip(names, around, strict=True)
        }


@torch.no_grad()
def residual(network: nn.Module, x: Tensor) -> list[str]:
    """Return the innermost modules that pass their input on when all their parameters are zero, in order."""
    inputs: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: inputs.setdefault(name, args[0]))
        for name, module in network.named_modules()
        if name and next(module.children(), None) is not None
    ]
    network.eval()(x)
    for handle in handles:
        handle.remove()
    found = [name for name, given in inputs.items() if _passes_on(network.get_submodule(name), given)]
    return [name for name in found if not any(other.startswith(f"{name}.") for other in found)]


def _passes_on(module: nn.Module, given: Tensor) -> bool:
    if next(module.parameters(), None) is None or not isinstance(given, Tensor):
        return False
    empty = copy.deepcopy(module)
    for parameter in empty.parameters():
        parameter.zero_()
    try:
        return bool(torch.equal(empty(given), given))
    except (RuntimeError, TypeError):  # it takes more than one input, or other shapes of zero
        return False


def _around(network: nn.Module, names: list[str], x: Tensor, y: Tensor) -> Iterator[tuple[float, float]]:
    """Yield the modularity of the classes in each block's input and output."""
    behind = similarity.grams(network, names, x)
    before: dict[str, Tensor] = {}

    def watch(module: nn.Module, args: tuple[Tensor, ...], name: str) -> None:
        flat = args[0].flatten(1).double()
        before[name] = flat @ flat.T

    handles = [
        network.get_submodule(name).register_forward_pre_hook(lambda m, a, name=name: watch(m, a, name))
        for name in names
    ]
    network(x)
    for handle in handles:
        handle.remove()
    for name in names:
        yield similarity.modularity(before[name], y), similarity.modularity(behind[name], y)


def _without(group: ChannelGroup, inside: tuple[str, ...]) -> ChannelGroup | None:
    """Return the group without the layers that are gone; None where nothing is left to prune."""
    producers, consumers = (
        tuple(name for name in names if not name.startswith(inside)) for names in (group.producers, group.consumers)
    )
    if not producers or not consumers:
        return None
    return ChannelGroup(group.name, producers, consumers, unit=group.unit)
