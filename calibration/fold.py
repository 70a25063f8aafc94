"""A binary layer whose batch norm is read by a sign alone: scale, bias and norm become one integer an output.

The sum of a binary layer is a whole number, and all that follows it up to the sign never falls where the norm's weight
is positive and never rises where it is negative. So the sign changes at one sum, which is found by asking the float
layers about every sum there is: their roundings are part of the answer. Where it never rises, the signs of the
output's weights are turned, and the comparison is the same for all.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qtoolkit.calibration.options import Options
from qtoolkit.errors import RequestError
from qtoolkit.stages import Block, Stream
from qtoolkit.vision.context import VisionContext
from qtoolkit.vision.layers import Binary, scaled


class FoldOptions(Options):
    """Options of the step ``fold``: there are none."""


class Fold:
    """The transform: gives binary layers thresholds where the architecture says that just a norm and a sign follow."""

    Options = FoldOptions

    def __init__(self, options: FoldOptions) -> None:
        self.options = options

    @torch.no_grad()
    def apply(self, block: Block, stream: Stream, context: VisionContext) -> dict[str, dict[str, float]]:
        """Fold in place; the norm becomes an identity. Return the part of each layer's outputs that were turned."""
        report = {}
        for name, norm_name in context.architecture.folds.items():
            layer = block.module.get_submodule(name)
            if not isinstance(layer, Binary):
                continue
            norm = block.module.get_submodule(norm_name)
            if not isinstance(norm, nn.BatchNorm2d):
                raise RequestError(f"{norm_name}, which {name} is to be folded with, is no BatchNorm2d.")
            layer.thresholds, layer.turned = thresholds(layer, norm.eval())
            block.module.set_submodule(norm_name, nn.Identity())
            report[name] = {"turned": float(layer.turned.double().mean())}
        return report


def thresholds(layer: Binary, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return int32 [n], the least sum that gives +1, and bool [n], the outputs whose sums are to be negated first."""
    k = layer.geometry.k
    sums = torch.arange(-k, k + 1, dtype=torch.float32).view(1, 1, -1, 1).expand(1, layer.geometry.n, -1, 1)
    plus = norm(scaled(sums, layer.scales(), layer.bias, linear=False))[0, :, :, 0] >= 0  # [n, sums]
    turned = plus[:, 0] & ~plus[:, -1]
    plus = torch.where(turned.unsqueeze(1), plus.flip(1), plus)
    least = torch.where(plus.any(dim=1), plus.long().argmax(dim=1) - k, k + 1)  # k + 1: no sum is enough
    return least.to(torch.int32), turned
