"""A moving average of weights: what a training that does not come to rest goes round (Izmailov et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Average:
    """m <- m + (w - m) / steps, beginning at the first weights.

    Args:
        steps: about how far the average looks back; what is older than that has a weight of 1 / e in all.
    """

    def __init__(self, steps: float) -> None:
        self.part = 1 / max(steps, 1.0)
        self.means: list[Tensor] = []

    @torch.no_grad()
    def add(self, weights: Sequence[Tensor]) -> None:
        """Take the weights of one step in."""
        if not self.means:
            self.means = [weight.detach().clone() for weight in weights]
        for mean, weight in zip(self.means, weights, strict=True):
            mean.lerp_(weight, self.part)
