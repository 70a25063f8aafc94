"""What a vision transform may use besides the block and the stream of calibration images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from qtoolkit.errors import RequestError
from qtoolkit.job import Job
from qtoolkit.stages import Stream
from qtoolkit.vision.data import Images
from qtoolkit.vision.measure import batch_of
from qtoolkit.vision.models import Architecture
from qtoolkit.vision.pattern import Pattern

BATCH = 128
Progress = Callable[[str], None]  # is given every line worth reading
Step = Callable[[int, int], None]  # is told how many training steps are done, and of how many


def unseen(done: int, total: int) -> None:
    """Tell nobody: the default of the Python interface."""


@dataclass(frozen=True)
class VisionContext:
    """The pattern to reach, the training images, the seed, words to the user, and where a long step saves itself.

    ``original`` makes the trained float network anew, as it was before any step; None if its weights are random.
    """

    pattern: Pattern
    architecture: Architecture
    training: Images
    seed: int
    say: Progress
    job: Job | None = None
    original: Callable[[], nn.Module] | None = None
    step: Step = unseen

    def taught_by(self) -> nn.Module:
        """Return a copy of the float network that the weights were trained for, for a step to learn from.

        Raises:
            RequestError: the weights are random.
        """
        if self.original is None:
            raise RequestError("Nothing can be learnt from random weights.", "Add --weights, or recover.distill=0.")
        return self.original()

    def generator(self) -> torch.Generator:
        """Return a fresh source of randomness that depends on the recipe's seed alone."""
        return torch.Generator().manual_seed(self.seed)


def stream(images: Images, architecture: Architecture) -> Stream:
    """Return calibration images as the batches a block receives."""
    batches = [x for x, _ in images.batches(batch_of(architecture, BATCH), architecture)]
    return Stream(batches, [{} for _ in batches])
