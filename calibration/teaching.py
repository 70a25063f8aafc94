"""What a network in training is held against: the labels, and the answers of the float network it came from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Teaching:
    """The error of logits: (1 - share) cross-entropy + share T^2 KL(softmax(teacher / T) || softmax(logits / T)).

    Source: Hinton et al. 2015; the teacher sees each view as the pupil does (Beyer et al. 2022). A few epochs on few
    images against labels alone forget what the float network learnt from many; its answers bring that along.

    Args:
        share: part of the error that is the divergence, 0 to 1; at 0 no teacher is needed.
        temperature: T.
        original: gives the float network; called once, if at all.
    """

    def __init__(self, share: float, temperature: float, original: Callable[[], nn.Module]) -> None:
        self.share, self.temperature = share, temperature
        self.teacher = original().eval().requires_grad_(False) if share else None

    def error(self, logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean error of ``logits`` [images, classes] for images ``x`` of classes ``y``."""
        if self.teacher is None:
            return F.cross_entropy(logits, y)
        with torch.no_grad():
            aim = (self.teacher(x).float() / self.temperature).log_softmax(dim=1)
        answers = (logits / self.temperature).log_softmax(dim=1)
        divergence = F.kl_div(answers, aim, reduction="batchmean", log_target=True) * self.temperature**2
        return (1 - self.share) * F.cross_entropy(logits, y) + self.share * divergence
