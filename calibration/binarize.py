"""Turning float layers into binary ones, whose weights and inputs are signs; training (``recover``) does the rest."""

from __future__ import annotations

from qtoolkit.calibration.options import Options
from qtoolkit.stages import Block, Stream
from qtoolkit.vision.context import VisionContext
from qtoolkit.vision.layers import Binary
from qtoolkit.vision.matrix import Layer


class BinarizeOptions(Options):
    """Options of the step ``binarize``: there are none."""


class Binarize:
    """The transform: replaces every target by a ``Binary`` layer with the same latent weight."""

    Options = BinarizeOptions

    def __init__(self, options: BinarizeOptions) -> None:
        self.options = options

    def apply(self, block: Block, stream: Stream, context: VisionContext) -> dict[str, dict[str, float]]:
        """Replace in place; return each target's relative squared distance between weight and binary weight."""
        report = {}
        for name in block.targets:
            if name not in block.refused:
                like: Layer = block.layer(name)  # type: ignore[assignment]
                made = Binary(like)
                weight = like.weight.detach()
                scale = weight.abs().flatten(1).mean(dim=1).view(-1, *[1] * (weight.dim() - 1))
                lost = (weight - scale * weight.sign()).square().sum() / weight.square().sum().clamp_min(1e-12)
                report[name] = {"error": float(lost)}
                block.module.set_submodule(name, made)
        return report
