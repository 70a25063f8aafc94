"""Which filters matter: scores per output channel from weights, gradients, batch norms or feature maps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qtoolkit.calibration.capture import layer_inputs
from qtoolkit.errors import RequestError
from qtoolkit.registry import suggest
from qtoolkit.stages import Block, Stream
from qtoolkit.vision.context import BATCH, VisionContext
from qtoolkit.vision.matrix import weight_of

WEIGHT = ("l2", "fpgm")
ALL = (*WEIGHT, "taylor", "batchnorm", "ezcrop")
ZONE = 0.25  # EZCrop's alpha: the central square's half width as a part of the map's


def weight_score(weight: Tensor, criterion: str = "l2") -> Tensor:
    """Return [n] for a weight [n, ...]: ``l2`` norm, or ``fpgm``, the sum of distances to the other filters.

    Sources: SFP (He et al. 2018); FPGM (He et al. 2019): a filter near the others' median can be replaced by them.
    """
    flat = weight.flatten(1)
    return flat.norm(dim=1) if criterion == "l2" else torch.cdist(flat, flat).sum(dim=1)


def scores(block: Block, name: str, criterion: str, stream: Stream, context: VisionContext) -> Tensor:
    """Return how much each filter of layer ``name`` matters: [n], larger is more.

    Raises:
        RequestError: an unknown criterion, or one that needs a batch norm behind the layer where there is none.
    """
    weight = weight_of(block, name).detach()
    if criterion in WEIGHT:
        return weight_score(weight, criterion)
    if criterion == "taylor":
        return taylor(block, name, context)
    group = next((g for g in block.groups if g.producers[0] == name), None)
    if criterion == "batchnorm":
        if group is None or len(group.producers) < 2:
            raise RequestError(f"The layer {name} has no batch norm of its own.", "Choose the criterion l2.")
        return weight_of(block, group.producers[1]).detach().abs()
    if criterion == "ezcrop":
        if group is None:
            raise RequestError(f"Nobody alone reads the channels of {name}.", "Choose the criterion l2.")
        return ezcrop(block, group.consumers[0], stream)
    raise RequestError(f"There is no filter criterion {criterion!r}.", suggest(criterion, ALL))


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
        spectrum = torch.fft.fftshift(torch.fft.fft2(maps), dim=(-2, -1)).abs().log1p()
        height, width = maps.shape[-2:]
        rows, columns = (
            slice(size // 2 - round(ZONE * size), size // 2 + round(ZONE * size) + 1) for size in (height, width)
        )
        everything = spectrum.sum(dim=(-2, -1)).clamp_min(1e-12)
        total = total + (1 - spectrum[..., rows, columns].sum(dim=(-2, -1)) / everything).sum(dim=0)
        images += len(maps)

    layer_inputs(block, stream, {consumer: add}, raw=True)
    return total / images
