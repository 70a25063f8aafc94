"""What a network in training is held against: the labels, and the answers of float networks that know the classes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtoolkit.calibration.compiled import answering_pass
from qtoolkit.errors import RequestError
from qtoolkit.vision import measure, models
from qtoolkit.vision.context import VisionContext
from qtoolkit.vision.models import Architecture


class Teaching:
    """The error of logits: (1 - share) cross-entropy + share T^2 KL(softmax(teacher / T) || softmax(logits / T)).

    Source: Hinton et al. 2015; the teachers see each view as the pupil does (Beyer et al. 2022), and teach the mean of
    their logits. A few epochs on few images against labels alone forget what the float network learnt from many; its
    answers bring that along.

    Args:
        share: part of the error that is the divergence, 0 to 1.
        temperature: T.
        teachers: networks that take what the pupil takes; none where ``share`` is 0.
        remember: keep the answers, in 40 bytes and some an image of ten classes, for when the same batch comes again:
            two teachers take as long as two thirds of a pupil's step.
        compiled: let torch compile the teachers.
    """

    def __init__(
        self,
        share: float,
        temperature: float,
        teachers: Sequence[nn.Module],
        *,
        remember: bool = False,
        compiled: bool = False,
    ) -> None:
        self.share, self.temperature, self.remember = share, temperature, remember
        self.teachers = [answering_pass(_still(teacher), compiled=compiled) for teacher in teachers]
        self.answered: dict[bytes, Tensor] = {}

    @torch.no_grad()
    def answers(self, x: Tensor) -> Tensor:
        """Return the mean of the teachers' logits, float32 [images, classes], for images ``x``."""
        batch = hashlib.blake2b(x.cpu().numpy().tobytes(), digest_size=16).digest() if self.remember else b""
        if batch in self.answered:
            return self.answered[batch]
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)  # a fifth faster on a CPU
        said = torch.stack([teacher(x).float() for teacher in self.teachers]).mean(dim=0)
        if self.remember:
            self.answered[batch] = said
        return said

    def error(self, logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean error of ``logits`` [images, classes] for images ``x`` of classes ``y``."""
        if not self.share:
            return F.cross_entropy(logits, y)
        aim = (self.answers(x) / self.temperature).log_softmax(dim=1)
        answers = (logits / self.temperature).log_softmax(dim=1)
        divergence = F.kl_div(answers, aim, reduction="batchmean", log_target=True) * self.temperature**2
        return (1 - self.share) * F.cross_entropy(logits, y) + self.share * divergence


def _still(teacher: nn.Module) -> nn.Module:
    """Return the teacher as it answers: it does not learn, and its convolutions read channels last."""
    return teacher.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class Renormalised(nn.Module):
    """A teacher that was trained on images of another mean and standard deviation than the pupil's."""

    def __init__(self, network: nn.Module, pupil: Architecture, teacher: Architecture) -> None:
        super().__init__()
        self.network = network
        (mean, std), (own_mean, own_std) = (
            (torch.tensor(a.mean).view(-1, 1, 1), torch.tensor(a.std).view(-1, 1, 1)) for a in (pupil, teacher)
        )
        self.scale, self.shift = std / own_std, (mean - own_mean) / own_std

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's logits of images that are normalised for the pupil."""
        return self.network(x * self.scale + self.shift)


def teachers(name: str, weights: str, pupil: nn.Module, context: VisionContext) -> list[nn.Module]:
    """Return who teaches: the float network that the pupil came from, if it had weights, and the one called ``name``.

    Args:
        name: one of our own networks, or a transformers classifier (folder or hub name); "" for none.
        weights: the former's weight file.
        pupil: the network in training.
        context: knows the float network and what its images look like.

    Raises:
        RequestError: nobody can teach, or the other network takes other images or tells other classes apart.
        ModelError: its weights are damaged or another network's.
    """
    if not name:
        return [context.taught_by()]
    found = models.resolve(name, weights or None)
    own, other = context.architecture, found.architecture
    if found.original is None:
        raise RequestError(f"The teacher {name} has random weights.", "Add --set recover.teacher_weights=FILE.")
    if other.input != own.input:
        raise RequestError(f"The teacher {name} takes images of {list(other.input)}, the network {list(own.input)}.")
    counts = [measure.classes(network, own) for network in (found.network, pupil)]
    if counts[0] != counts[1]:
        raise RequestError(f"The teacher {name} tells {counts[0]} classes apart, the network {counts[1]}.")
    same = (other.mean, other.std) == (own.mean, own.std)
    teacher = found.network if same else Renormalised(found.network, own, other)
    return [teacher] if context.original is None else [context.original(), teacher]
