"""Which filters matter: scores per output channel from weights, gradients, batch norms or feature maps."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtoolkit.calibration.capture import layer_inputs
from qtoolkit.errors import RequestError
from qtoolkit.registry import suggest
from qtoolkit.stages import Block, ChannelGroup, Stream
from qtoolkit.vision.context import BATCH, VisionContext
from qtoolkit.vision.dependencies import writers
from qtoolkit.vision.matrix import weight_of

WEIGHT = ("l2", "fpgm")
ALL = (*WEIGHT, "taylor", "batchnorm", "ezcrop")
ZONE = 0.25  # EZCrop's alpha: the central square's half width as a part of the way from the middle to the edge


def weight_score(weight: Tensor, criterion: str = "l2") -> Tensor:
    """Return [n] for a weight [n, ...]: ``l2`` norm, or ``fpgm``, the sum of distances to the other filters.

    Sources: SFP (He et al. 2018); FPGM (He et al. 2019): a filter near the others' median can be replaced by them.
    """
    flat = weight.flatten(1)
    return flat.norm(dim=1) if criterion == "l2" else torch.cdist(flat, flat).sum(dim=1)


def scores(block: Block, group: ChannelGroup, criterion: str, stream: Stream, context: VisionContext) -> Tensor:
    """Return how much each unit of a group's channels matters: [channels / unit], larger is more.

    Raises:
        RequestError: an unknown criterion, or one that needs a batch norm or feature maps where there are none.
    """
    if criterion in WEIGHT:
        return joined(
            [weight_score(weight_of(block, name).detach(), criterion) for name in made_by(block, group)], group
        )
    if criterion == "taylor":
        return joined([taylor(block, name, context) for name in made_by(block, group)], group)
    if criterion == "batchnorm":
        norms = [name for name in group.producers if isinstance(block.layer(name), nn.BatchNorm2d)]
        if not norms:
            raise RequestError(f"The layer {group.name} has no batch norm of its own.", "Choose the criterion l2.")
        return joined([weight_of(block, name).detach().abs() for name in norms], group)
    if criterion == "ezcrop":
        if not group.consumers:
            raise RequestError(f"Nobody alone reads the channels of {group.name}.", "Choose the criterion l2.")
        return joined([ezcrop(block, group.consumers[0], stream)], group)
    raise RequestError(f"There is no filter criterion {criterion!r}.", suggest(criterion, ALL))


def made_by(block: Block, group: ChannelGroup) -> list[str]:
    """Return the layers whose filters make the group's channels; a sum joins several."""
    return writers(group, block.module)


def joined(parts: list[Tensor], group: ChannelGroup) -> Tensor:
    """Return one score a unit from every layer's [channels]: the sum of scores relative to their layer's mean."""
    total = parts[0] if len(parts) == 1 else torch.stack([p / p.mean().clamp_min(1e-12) for p in parts]).sum(dim=0)
    return total.view(-1, group.unit).sum(dim=1) if group.unit > 1 else total


def taylor(block: Block, name: str, context: VisionContext) -> Tensor:
    """Return sum |w * dL/dw| per filter on the first training images (Molchanov et al. 2019)."""
    weight = weight_of(block, name)
    with torch.enable_grad():
        x, y = next(context.training.first(2 * BATCH).batches(2 * BATCH, context.architecture))
        weight.requires_grad_(True)
        loss = F.cross_entropy(block.module(x), y)
        (gradient,) = torch.autograd.grad(loss, [weight])
    return (weight.detach() * gradient).abs().flatten(1).sum(dim=1)


def ezcrop(block: Block, consumer: str, stream: Stream) -> Tensor:
    """Return, per input channel of ``consumer``, the part of the feature maps' spectral energy outside the centre.

    Source: EZCrop (Lin et al. 2022): E = sum log(1 + |FFT|); a map whose energy sits in few low frequencies has low
    rank and can go.
    """
    total, images = torch.zeros(()), 0

    def add(maps: Tensor) -> None:
        nonlocal total, images
        if maps.dim() != 4:
            raise RequestError(f"{consumer} reads no feature maps, so ezcrop has no spectrum.", "Choose l2.")
        spectrum = torch.fft.fftshift(torch.fft.fft2(maps), dim=(-2, -1)).abs().log1p()
        rows, columns = (centre(size) for size in maps.shape[-2:])
        everything = spectrum.sum(dim=(-2, -1))
        outside = everything - spectrum[..., rows, columns].sum(dim=(-2, -1))
        total = total + (outside / everything.clamp_min(1e-12)).sum(dim=0)  # a dead map counts as 0
        images += len(maps)

    layer_inputs(block, stream, {consumer: add}, raw=True)
    return total / images


def centre(size: int) -> slice:
    """Return the low frequencies of a shifted spectrum of ``size``: up to a quarter of the way out, rounded up."""
    middle = size // 2  # where frequency 0 is
    step = 0 if middle <= 1 else math.ceil(ZONE * (size - 1 - middle))
    return slice(middle - step, middle + step + 1)
