"""Batch-norm re-estimation: after weights changed, measure means and variances again on training images."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import nn

from qtoolkit.calibration.options import Options
from qtoolkit.stages import Block, Stream
from qtoolkit.vision.context import BATCH, VisionContext


class BatchNormOptions(Options):
    """Options of the step ``batchnorm``."""

    images: int = Field(4096, ge=1, description="training images; 512 cost a dense ResNet-20 two points")


class BatchNorm:
    """The transform: replaces every batch norm's running statistics by averages over the images."""

    Options = BatchNormOptions

    def __init__(self, options: BatchNormOptions) -> None:
        self.options = options

    @torch.no_grad()
    def apply(self, block: Block, stream: Stream, context: VisionContext) -> dict[str, dict[str, float]]:
        """Re-estimate in place; return how many images were used."""
        norms = [module for module in block.module.modules() if isinstance(module, nn.BatchNorm2d)]
        if not norms:
            return {}
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average
        block.module.train()
        images = context.training.first(self.options.images)
        for x, _ in images.batches(BATCH, context.architecture):
            block.module(x)
        block.module.eval()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        return {"batchnorm": {"images": float(len(images))}}
