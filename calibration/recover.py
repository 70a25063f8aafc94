"""One trainer for every method: SGD with three hooks, for masks, gradients and epochs; a method is a row of options.

| method | masks | schedule | regularizer |
|---|---|---|---|
| SFP | after each epoch, then settled | one-shot | none |
| CR-SFP | after each epoch | one-shot | cr-kl |
| SR-STE | in the forward pass, settled if wanted | one-shot | sr-ste |
| MaxQ | in the forward pass, soft, settled if wanted | linear | sr-ste |
| OvSW | none (binary layers) | | ags-sad |
| ReCU | none (binary layers) | | recu |
| ADMM | none until the end | | admm |
| DeBut | none (butterfly layers) | | none |

Any row may learn from the float network besides the labels (``distill``, see ``teaching.py``), which keeps what many
images taught it, and start from weights that already have the pattern: MaxQ's soft mask is divided out of those.

A filter that grows again after an epoch is small, but its batch norm brings it to full size at once, so that the next
removal hurts anew; published trainings take 200 epochs to settle. With ``settle`` a short one ends with removed
filters, batch-norm shifts included, staying away. Masks of the forward pass settle there, too: they are folded into the
weights, soft ones with what they multiply by, and the rest trains what is left.

Batch norms are to be measured again after a training whose weights were averaged (``average``): none has seen them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qtoolkit.calibration import criteria, filters, logs, projections
from qtoolkit.calibration.averaging import Average
from qtoolkit.calibration.compiled import training_pass
from qtoolkit.calibration.options import Options
from qtoolkit.calibration.regularizers import REGULARIZERS, Plain
from qtoolkit.calibration.schedules import still_dense
from qtoolkit.calibration.teaching import Teaching, teachers
from qtoolkit.errors import NumericError, RequestError
from qtoolkit.stages import Block, ChannelGroup, Stream
from qtoolkit.vision import data
from qtoolkit.vision.context import VisionContext
from qtoolkit.vision.matrix import weight_of

STATE = "recover"


class RecoverOptions(Options):
    """Options of the step ``recover``."""

    epochs: int = Field(5, ge=1)
    batch: int = Field(128, ge=1)
    lr: float = Field(0.01, gt=0, description="after one warm-up pass of 5 % it falls along a cosine")
    rest: float = Field(0.0, ge=0, le=1, description="part of lr that is left at the end of the cosine")
    average: float = Field(
        0.0, ge=0, le=1, description="part of the training over which weights are averaged; 0: the last ones stay"
    )
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0, description="not on batch norms and biases")
    masks: Literal["none", "forward", "epoch"] = Field("none", description="when the pattern is enforced")
    soft: bool = Field(False, description="MaxQ's soft mask instead of 0 and 1")
    criterion: Literal["l2", "fpgm"] = Field("l2", description="which filters go")
    where: filters.Where = Field("inner", description="which filters go, as in the step filters")
    schedule: str = Field("one-shot", description="one-shot, linear, cosine, cubic or exponential")
    ramp: float = Field(0.5, ge=0, le=1, description="part of the training after which the pattern is complete")
    settle: float = Field(1.0, ge=0, le=1, description="part of the training after which masks stay as they are")
    regularizer: Literal["none", "sr-ste", "cr-kl", "ags-sad", "recu", "admm"] = "none"
    strength: float = Field(2e-4, ge=0, description="the regularizer's factor")
    distill: float = Field(0.0, ge=0, le=1, description="part of the loss that is learnt from the float network")
    temperature: float = Field(4.0, gt=0, description="of its answers")
    teacher: str = Field("", description="a second network that teaches with it: a name, folder or hub name")
    teacher_weights: str = Field("", description="the weight file of one of our own networks")
    mix: float = Field(0.0, ge=0, le=1, description="part of the images that are blended with another one")
    augment: bool = Field(True, description="random shifts and mirroring as the architecture says")
    views: int = Field(0, ge=0, description="epochs after which images, with teachers' answers, come again; 0: never")
    bfloat16: bool = Field(False, description="multiply in bfloat16: twice as fast where the processor can")
    compile: bool = Field(False, description="torch.compile pupil and teachers: takes up to half a minute, saves more")


class Recover:
    """The transform: trains the whole network under the recipe's pattern."""

    Options = RecoverOptions

    def __init__(self, options: RecoverOptions) -> None:
        self.options = options

    def apply(self, block: Block, stream: Stream, context: VisionContext) -> dict[str, dict[str, float]]:
        """Train in place, resuming at the last whole epoch; return loss, learning rate and zeros of every epoch.

        Raises:
            NumericError: the loss is NaN or Inf.
        """
        training = Training(block, self.options, context)
        report = training.run()
        training.finish()
        block.module.eval().requires_grad_(False)
        return report


class Training:
    """A running training: network, masks, optimiser, and the regularizer that looks at them."""

    def __init__(self, block: Block, options: RecoverOptions, context: VisionContext) -> None:
        self.block, self.options, self.context = block, options, context
        self.network = block.module.requires_grad_(True).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.weights: dict[str, nn.Parameter] = {}
        self.groups: list[ChannelGroup] = []  # of filters: each has one mask
        if options.masks != "none" or options.regularizer == "admm":
            if context.pattern.kind in ("binary", "debut"):
                raise RequestError(
                    f"The pattern {context.pattern.name} is no mask.", "Give recover.masks=none and no admm."
                )
            names = [name for name in block.targets if name not in block.refused]
            if context.pattern.kind == "filter":
                self.groups = filters.chosen(block, options.where, context)
                names = [name for group in self.groups for name in criteria.made_by(block, group)]
            self.weights = {f"{name}.weight": weight_of(block, name) for name in names}
        self.soft = options.soft and context.pattern.kind == "nm"  # masks of latent weights; averaged ones are final
        if self.soft:
            for weight in self.weights.values():  # a training from sparse weights starts from what they compute
                weight.data = projections.latent(weight.data, *context.pattern.nm)
        self.masks: dict[str, Tensor] = {}
        self.settled = False  # masks of the forward pass stay as they are
        self.progress = 0.0  # the part of the training that is done
        decayed = [p for p in self.network.parameters() if p.dim() > 1 or _is_flat_weight(p, self.network)]
        ids = {id(p) for p in decayed}
        plain = [p for p in self.network.parameters() if id(p) not in ids]
        self.optimizer = torch.optim.SGD(
            [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=options.lr,
            momentum=options.momentum,
            nesterov=options.momentum > 0,
        )
        if options.teacher and not options.distill:
            raise RequestError("A teacher is named that nothing is learnt from.", "Add --set recover.distill=0.9.")
        taught_by = teachers(options.teacher, options.teacher_weights, self.network, context) if options.distill else []
        self.teaching = Teaching(
            options.distill, options.temperature, taught_by, remember=options.views > 0, compiled=options.compile
        )
        self._pass = training_pass(self.network, compiled=options.compile)
        self.regularizer: Plain = REGULARIZERS[options.regularizer](options.strength)
        self.regularizer.start(self)
        self.steps = max(len(context.training) // options.batch, 1)  # an epoch
        self.average = Average(options.average * options.epochs * self.steps) if options.average else None

    def add_parameters(self, parameters: list[nn.Parameter]) -> None:
        """Train parameters that are not the network's own."""
        self.optimizer.add_param_group({"params": parameters, "weight_decay": self.options.weight_decay})

    def mask_of(self, weight: Tensor, dense: float) -> Tensor:
        """Return the mask that the pattern gives ``weight`` while the part ``dense`` of it is not enforced."""
        pattern = self.context.pattern
        if self.soft:
            return projections.soft_mask(weight.detach(), *pattern.nm, dense=dense)
        return projections.mask(weight.detach(), pattern, dense, self.options.criterion)

    def refresh(self, progress: float) -> None:
        """The first hook, before a forward pass or an epoch: compute the masks anew, unless they have settled."""
        if self.settled:
            return
        dense = still_dense(self.options.schedule, progress, self.options.ramp)
        if not self.groups:
            self.masks = {name: self.mask_of(weight, dense) for name, weight in self.weights.items()}
        for group in self.groups:
            names = [f"{name}.weight" for name in criteria.made_by(self.block, group)]
            parts = [criteria.weight_score(self.weights[name].detach(), self.options.criterion) for name in names]
            keep = projections.filter_mask(criteria.joined(parts, group), self.context.pattern.rate * (1 - dense), 1)
            keep = keep.repeat_interleave(group.unit)
            self.masks |= {name: keep.view(-1, *[1] * (self.weights[name].dim() - 1)) for name in names}

    @torch.no_grad()
    def settle(self) -> None:
        """Fold the masks into the weights, and keep from now on which are zero: soft masks become hard ones."""
        self.refresh(1.0)
        self._project()
        self.masks = {name: (mask != 0).to(mask.dtype) for name, mask in self.masks.items()}
        self.settled = True

    def projected(self) -> dict[str, Tensor]:
        """Return the weights a forward pass uses instead of the latent ones; their gradient passes unchanged."""
        if self.options.masks != "forward":
            return {}
        return {name: w + (w * self.masks[name] - w).detach() for name, w in self.weights.items()}

    @torch.no_grad()
    def used(self) -> list[Tensor]:
        """Return every parameter as the forward pass uses it, in the optimiser's order."""
        masks = self.masks if self.options.masks == "forward" else {}
        masked = {id(weight): masks[name] for name, weight in self.weights.items() if name in masks}
        return [p * masked[id(p)] if id(p) in masked else p for p in self._parameters()]

    def forward(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the logits of x with some weights replaced."""
        x = x.contiguous(memory_format=torch.channels_last)  # a fifth faster on a CPU
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.options.bfloat16):
            return self._pass(weights, x).float()

    def error(self, logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return how far ``logits`` are from what labels and teacher say about the images x of classes y."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.options.bfloat16):
            return self.teaching.error(logits, x, y)

    def run(self) -> dict[str, dict[str, float]]:
        """Train all epochs that are not done yet."""
        options, context = self.options, self.context
        report = self._restore()
        steps = self.steps
        architecture = context.architecture
        if not options.augment:
            architecture = architecture.model_copy(update={"augment": type(architecture.augment)()})
        for epoch in range(len(report), options.epochs):
            began, total, seen = time.monotonic(), 0.0, 0
            self.network.train()
            if options.masks == "forward" and epoch / options.epochs >= options.settle and not self.settled:
                self.settle()
            self.refresh(epoch / options.epochs)  # with zeros where filters are removed the mask stays what it was
            if options.masks == "epoch" and epoch == 0:
                self._project()  # the first epoch already trains against the pruning
            drawn = epoch % options.views if options.views else epoch
            generator = torch.Generator().manual_seed(context.seed * 1000 + drawn)  # resuming needs no generator state
            batches = context.training.epoch(options.batch, architecture, generator, self.regularizer.views)
            for step, (views, y) in enumerate(batches):
                self.progress = (epoch + step / steps) / options.epochs
                self._set_rate(self.progress)
                if options.masks == "forward":
                    self.refresh(self.progress)
                if options.mix:
                    views = data.mixed(views, options.mix, generator)
                loss = self.regularizer.loss(self, views, y)
                self.optimizer.zero_grad()
                loss.backward()
                self.regularizer.after_backward(self)
                self.optimizer.step()
                if self.average is not None:
                    self.average.add(self.used())
                if options.masks == "epoch" and epoch / options.epochs >= options.settle:
                    self._remove()
                context.step(epoch * steps + step + 1, options.epochs * steps)
                total, seen = total + float(loss.detach()) * len(y), seen + len(y)
                if not math.isfinite(total):
                    raise NumericError(
                        f"The training loss became NaN or Inf in epoch {epoch + 1}.", "Lower recover.lr."
                    )
            self.regularizer.after_epoch(self)
            if options.masks == "epoch" and (epoch + 1) / options.epochs <= options.settle:
                self.refresh((epoch + 1) / options.epochs)
                self._project()
            report[f"epoch-{epoch + 1}"] = {
                "loss": total / seen,
                "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
                "zeros": self._zeros(),
            }
            context.say(
                f"epoch {epoch + 1}/{options.epochs}: loss {total / seen:.4f}, {time.monotonic() - began:.0f} s"
            )
            self._save(report)
            if context.job is not None:
                logs.write(context.job.folder, report)
        return report

    @torch.no_grad()
    def finish(self) -> None:
        """Leave weights that have the pattern: masks are folded in, removed filters leave no constant behind."""
        if self.average is not None:
            for parameter, mean in zip(self._parameters(), self.average.means, strict=True):
                parameter.copy_(mean)
            self.soft = False
        self.regularizer.finish(self)
        self.refresh(1.0)
        self._remove()

    @torch.no_grad()
    def _remove(self) -> None:
        """Bring the weights onto the pattern; removed filters take along what follows and reads them."""
        self._project()
        for group in self.groups:
            first = criteria.made_by(self.block, group)[0]
            filters.remove(self.block, group, self.masks[f"{first}.weight"].flatten() == 0)

    @torch.no_grad()
    def _project(self) -> None:
        for name, weight in self.weights.items():
            weight.mul_(self.masks[name])

    def _zeros(self) -> float:
        """Return which part of the weights that get the pattern is zero or masked."""
        total = sum(weight.numel() for weight in self.weights.values())
        zero = sum(float((weight * self.masks.get(name, 1.0) == 0).sum()) for name, weight in self.weights.items())
        return zero / total if total else 0.0

    def _set_rate(self, progress: float) -> None:
        rest, falling = self.options.rest, (1 + math.cos(math.pi * progress)) / 2
        warm = min(progress / 0.05, 1.0) if progress < 0.05 else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * max(warm, 0.05) * (rest + (1 - rest) * falling)

    def _save(self, report: Mapping[str, Mapping[str, float]]) -> None:
        if self.context.job is None:
            return
        state = {f"network/{name}": tensor for name, tensor in self.network.state_dict().items()}
        state |= {f"regularizer/{name}": tensor for name, tensor in self.regularizer.state().items()}
        state |= {f"average/{i}": mean for i, mean in enumerate(self.average.means if self.average else [])}
        state |= {f"mask/{name}": mask for name, mask in self.masks.items() if self.settled}
        for index, parameter in enumerate(self._parameters()):
            if parameter in self.optimizer.state:  # one that no loss reaches has none
                state[f"momentum/{index}"] = self.optimizer.state[parameter]["momentum_buffer"]
        self.context.job.save(STATE, {name: tensor.detach().clone() for name, tensor in state.items()}, dict(report))

    def _restore(self) -> dict[str, dict[str, float]]:
        job = self.context.job
        if job is None or not job.has(STATE):
            return {}
        state = job.tensors(STATE)
        self.network.load_state_dict(_part(state, "network"))
        self.regularizer.restore(_part(state, "regularizer"))
        if self.average is not None:
            self.average.means = [state[f"average/{index}"] for index in range(len(self._parameters()))]
        self.masks = _part(state, "mask")
        self.settled = bool(self.masks)
        for index, parameter in enumerate(self._parameters()):
            if f"momentum/{index}" in state:
                self.optimizer.state[parameter]["momentum_buffer"] = state[f"momentum/{index}"]
        report = job.facts(STATE)
        self.context.say(f"going on after epoch {len(report)} of {self.options.epochs}")
        return report

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]


def _part(state: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{kind}/"): tensor for name, tensor in state.items() if name.startswith(f"{kind}/")}


def _is_flat_weight(parameter: nn.Parameter, network: nn.Module) -> bool:
    """Tell whether a one-dimensional parameter is a butterfly's numbers."""
    return any(getattr(module, "flat", None) is parameter for module in network.modules())
