"""What a vision transform may use besides the block and the stream of calibration images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qtoolkit.job import Job
from qtoolkit.stages import Stream
from qtoolkit.vision.data import Images
from qtoolkit.vision.measure import batch_of
from qtoolkit.vision.models import Architecture
from qtoolkit.vision.pattern import Pattern

BATCH = 128
Progress = Callable[[str], None]  # is given every line worth reading


@dataclass(frozen=True)
class VisionContext:
    """The pattern to reach, the training images, the seed, a line to the user, and where a long step saves itself."""

    pattern: Pattern
    architecture: Architecture
    training: Images
    seed: int
    say: Progress
    job: Job | None = None

    def generator(self) -> torch.Generator:
        """Return a fresh source of randomness that depends on the recipe's seed alone."""
        return torch.Generator().manual_seed(self.seed)


def stream(images: Images, architecture: Architecture) -> Stream:
    """Return calibration images as the batches a block receives."""
    batches = [x for x, _ in images.batches(batch_of(architecture, BATCH), architecture)]
    return Stream(batches, [{} for _ in batches])
