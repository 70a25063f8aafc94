"""What training adds to the plain loss and its gradient: one class for each published idea.

A regularizer may replace the loss of a batch, edit the gradients after the backward pass, and act after an epoch.
``trainer`` is the ``Training`` of ``recover.py``.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtoolkit.vision.layers import Binary

if TYPE_CHECKING:
    from qtoolkit.calibration.recover import Training

SILENT = 1e-4  # OvSW: a weight whose flip average is below this is silent
MEMORY = 0.999  # OvSW: of the flip average


class Plain:
    """No regularizer: cross-entropy with the projected weights."""

    views = 1

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def start(self, trainer: Training) -> None:
        """Prepare state that depends on the network."""

    def loss(self, trainer: Training, views: list[Tensor], y: Tensor) -> Tensor:
        """Return the loss of one batch."""
        return trainer.error(trainer.forward(views[0], trainer.projected()), views[0], y)

    @torch.no_grad()
    def after_backward(self, trainer: Training) -> None:
        """Edit the gradients."""

    @torch.no_grad()
    def after_epoch(self, trainer: Training) -> None:
        """Act at the end of an epoch."""

    def finish(self, trainer: Training) -> None:
        """Bring the network into its final form."""

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed training needs."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state`` returned."""


class SparseDecay(Plain):
    """Weights outside the mask decay: grad += strength * (1 - min(mask, 1)) * w (SR-STE, Zhou et al. 2021)."""

    @torch.no_grad()
    def after_backward(self, trainer: Training) -> None:
        """Add the decay."""
        for name, weight in trainer.weights.items():
            weight.grad.add_((1 - trainer.masks[name].clamp(max=1.0)) * weight, alpha=self.strength)  # type: ignore[union-attr]


class Consistency(Plain):
    """Two passes on two views, pruned and dense, each with a classifier of its own, that teach each other (CR-SFP).

    Source: Xiang et al. 2023. L = CE(z_p) + CE(z_r) + strength / 2 (KL(z_r || z_p) + KL(z_p || z_r)), where the first
    of each pair is a constant. The pruned pass has hard gradients, the dense one reaches every filter.
    """

    views = 2

    def start(self, trainer: Training) -> None:
        """Copy the classifier: the last linear layer."""
        names = [name for name, module in trainer.network.named_modules() if isinstance(module, nn.Linear)]
        self.name = names[-1]
        self.head = copy.deepcopy(trainer.network.get_submodule(self.name))
        trainer.add_parameters(list(self.head.parameters()))

    def loss(self, trainer: Training, views: list[Tensor], y: Tensor) -> Tensor:
        """Return the two errors and the two divergences."""
        masked = {name: weight * trainer.masks[name] for name, weight in trainer.weights.items()}
        masked |= {f"{self.name}.{name}": parameter for name, parameter in self.head.named_parameters()}
        pruned, dense = trainer.forward(views[0], masked), trainer.forward(views[1], {})
        errors = trainer.error(pruned, views[0], y) + trainer.error(dense, views[1], y)
        p, r = pruned.log_softmax(dim=1), dense.log_softmax(dim=1)
        divergences = F.kl_div(p, r.detach(), reduction="batchmean", log_target=True) + F.kl_div(
            r, p.detach(), reduction="batchmean", log_target=True
        )
        return errors + self.strength / 2 * divergences

    def finish(self, trainer: Training) -> None:
        """The pruned pass's classifier becomes the network's."""
        trainer.network.set_submodule(self.name, self.head)

    def state(self) -> dict[str, Tensor]:
        """Return the second classifier."""
        return dict(self.head.state_dict())

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take the second classifier back."""
        self.head.load_state_dict(state)


class Overcome(Plain):
    """Keeps binary weights flipping (OvSW, Xiang et al. 2024): scaled gradients, and decay of those that are silent.

    AGS, per output channel: |g| < threshold * |w|  =>  g *= threshold * |w| / |g|.
    SAD: o = mu o + (1 - mu) [sign flipped]; where o < 1e-4: g += strength * w.
    """

    threshold = 0.04  # the paper's value for CIFAR

    def start(self, trainer: Training) -> None:
        """Find the binary layers; all weights count as silent at first."""
        self.layers = {n: m.weight for n, m in trainer.network.named_modules() if isinstance(m, Binary)}
        self.flips = {name: torch.zeros_like(weight) for name, weight in self.layers.items()}
        self.signs = {name: weight.detach() >= 0 for name, weight in self.layers.items()}

    @torch.no_grad()
    def after_backward(self, trainer: Training) -> None:
        """Track the flips of the last step, then scale and decay."""
        for name, weight in self.layers.items():
            now = weight >= 0
            self.flips[name].mul_(MEMORY).add_((now != self.signs[name]).float(), alpha=1 - MEMORY)
            self.signs[name] = now
            gradient: Tensor = weight.grad  # type: ignore[assignment]
            wanted = self.threshold * weight.flatten(1).norm(dim=1).clamp_min(1e-3)
            factor = (wanted / gradient.flatten(1).norm(dim=1).clamp_min(1e-6)).clamp_min(1.0)
            gradient.mul_(factor.view(-1, *[1] * (gradient.dim() - 1)))  # not on a flat view: it may be a copy
            gradient.add_((self.flips[name] < SILENT) * weight, alpha=self.strength)

    def state(self) -> dict[str, Tensor]:
        """Return flip averages and last signs."""
        return {f"{k}:flips": v for k, v in self.flips.items()} | {f"{k}:signs": v for k, v in self.signs.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take them back."""
        for name in self.layers:
            self.flips[name], self.signs[name] = state[f"{name}:flips"], state[f"{name}:signs"]


class Revive(Plain):
    """Clamps latent binary weights to +-q before each pass, so that far ones can flip again (ReCU, Xu et al. 2021).

    q = -mean|w| ln(2 - 2 tau), the quantile tau of a Laplace distribution, for each layer; tau rises from 0.85 to 0.99.
    """

    first, last = 0.85, 0.99

    def loss(self, trainer: Training, views: list[Tensor], y: Tensor) -> Tensor:
        """Clamp, then return the loss of one batch."""
        tau = self.first + (self.last - self.first) * trainer.progress
        with torch.no_grad():
            for module in trainer.network.modules():
                if isinstance(module, Binary):
                    q = -float(module.weight.abs().mean()) * math.log(2 - 2 * tau)
                    module.weight.clamp_(-q, q)
        return super().loss(trainer, views, y)


class Multipliers(Plain):
    """ADMM: pull the weights towards the pattern, grad += rho (w - z + u), and move the target after every epoch.

    Source: Zhang et al. 2018. After an epoch: z = projection(w + u), u += w - z, rho *= 1.3.
    """

    growth = 1.3

    def start(self, trainer: Training) -> None:
        """The first target is the projection of the weights as they are."""
        self.rho = torch.tensor(self.strength)
        self.u = {name: torch.zeros_like(weight) for name, weight in trainer.weights.items()}
        self.z = {name: (weight * trainer.mask_of(weight, 0.0)).detach() for name, weight in trainer.weights.items()}

    @torch.no_grad()
    def after_backward(self, trainer: Training) -> None:
        """Add the pull."""
        for name, weight in trainer.weights.items():
            weight.grad.add_(self.rho * (weight - self.z[name] + self.u[name]))  # type: ignore[union-attr]

    @torch.no_grad()
    def after_epoch(self, trainer: Training) -> None:
        """Move target, multipliers and strength."""
        for name, weight in trainer.weights.items():
            aim = weight + self.u[name]
            self.z[name] = aim * trainer.mask_of(aim, 0.0)
            self.u[name] = aim - self.z[name]
        self.rho = self.rho * self.growth

    def state(self) -> dict[str, Tensor]:
        """Return multipliers, targets and strength."""
        return {f"{k}:u": v for k, v in self.u.items()} | {f"{k}:z": v for k, v in self.z.items()} | {"rho": self.rho}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take them back."""
        self.u = {name: state[f"{name}:u"] for name in self.u}
        self.z = {name: state[f"{name}:z"] for name in self.z}
        self.rho = state["rho"]


REGULARIZERS: dict[str, type[Plain]] = {
    "none": Plain,
    "sr-ste": SparseDecay,
    "cr-kl": Consistency,
    "ags-sad": Overcome,
    "recu": Revive,
    "admm": Multipliers,
}
