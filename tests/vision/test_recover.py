"""The trainer: every method's row leaves its pattern, resuming gives the same network, gradients are right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qtoolkit.calibration.averaging import Average
from qtoolkit.calibration.recover import Recover, RecoverOptions, Training
from qtoolkit.calibration.teaching import Teaching, teachers
from qtoolkit.errors import NumericError, RequestError
from qtoolkit.job import Job
from qtoolkit.stages import Block, Stream
from qtoolkit.vision import data, layers, measure, models
from qtoolkit.vision.context import VisionContext
from qtoolkit.vision.matrix import to_matrix, weight_of
from qtoolkit.vision.networks import DigitsNet
from qtoolkit.vision.pattern import Pattern

NM, FILTER = Pattern(pattern="2:4"), Pattern(pattern="filter", rate=0.25)
METHODS: dict[str, tuple[Pattern, dict[str, Any]]] = {
    "sr-ste": (NM, {"masks": "forward", "regularizer": "sr-ste"}),
    "maxq": (NM, {"masks": "forward", "soft": True, "schedule": "linear", "regularizer": "sr-ste"}),
    "admm": (NM, {"regularizer": "admm", "strength": 1e-2}),
    "sfp": (FILTER, {"masks": "epoch", "where": "all", "settle": 0.5}),
    "cr-sfp": (FILTER, {"masks": "epoch", "where": "all", "settle": 0.5, "regularizer": "cr-kl", "strength": 1.0}),
    "subp": (Pattern(pattern="1x8", rate=0.5), {"masks": "forward", "schedule": "cosine", "regularizer": "sr-ste"}),
}


def prepared(pattern: Pattern, job: Job | None = None, count: int = 256) -> tuple[Block, Stream, VisionContext]:
    model = models.resolve("digits")
    images = data.load("digits-train", model.architecture).first(count)
    return model.block(), Stream([], []), VisionContext(pattern, model.architecture, images, 0, lambda text: None, job)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_trained_network_has_the_pattern_and_a_lower_loss(method: str) -> None:
    pattern, options = METHODS[method]
    block, images, context = prepared(pattern)
    report = Recover(RecoverOptions(epochs=4, batch=32, lr=0.05, **options)).apply(block, images, context)
    assert report["epoch-4"]["loss"] < 0.95 * report["epoch-1"]["loss"]  # 32 steps from random weights
    for name in block.targets:
        matrix = to_matrix(weight_of(block, name))
        if pattern.kind == "nm":
            assert (matrix.view(-1, 4) != 0).sum(dim=1).max() <= 2
            assert (matrix != 0).float().mean() > 0.49
        elif pattern.kind == "filter":
            assert int((matrix.abs().sum(dim=1) == 0).sum()) == 8
        else:
            assert 0.49 < (matrix != 0).float().mean() < 0.51


@pytest.mark.parametrize(("regularizer", "strength"), [("ags-sad", 9e-4), ("recu", 0.0)])
def test_binary_layers_learn(regularizer: Any, strength: float) -> None:
    block, images, context = prepared(Pattern(pattern="binary"))
    for name in block.targets:
        block.module.set_submodule(name, layers.Binary(block.layer(name)))  # type: ignore[arg-type]
    options = RecoverOptions(epochs=6, batch=32, lr=0.1, regularizer=regularizer, strength=strength)
    report = Recover(options).apply(block, images, context)
    assert report["epoch-6"]["loss"] < 0.95 * report["epoch-1"]["loss"]  # 48 steps from random weights


def test_small_gradients_of_binary_filters_are_scaled_up_and_silent_weights_decay() -> None:
    block, _, context = prepared(Pattern(pattern="binary"))
    for name in block.targets:
        block.module.set_submodule(name, layers.Binary(block.layer(name)))  # type: ignore[arg-type]
    training = Training(block, RecoverOptions(regularizer="ags-sad", strength=0.5), context)
    weight = weight_of(block, "conv2")
    for parameter in training.network.parameters():
        parameter.grad = torch.full_like(parameter, 1e-6)
    training.regularizer.after_backward(training)
    assert weight.grad is not None
    decay = 0.5 * weight.detach()  # nothing has flipped yet: every weight is silent
    norms = (weight.grad - decay).flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, 0.04 * weight.detach().flatten(1).norm(dim=1), rtol=1e-3, atol=0)


class Stopped(Exception):
    pass


def test_a_resumed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    options = RecoverOptions(epochs=3, batch=64, lr=0.05, masks="epoch", where="all", regularizer="cr-kl", strength=1.0)
    block, images, context = prepared(FILTER, Job.open(tmp_path / "whole", {}))
    Recover(options).apply(block, images, context)

    again, images, _ = prepared(FILTER)
    job = Job.open(tmp_path / "cut", {})

    def stop(text: str) -> None:
        if text.startswith("epoch 3"):
            raise Stopped  # after the third epoch's work, before it is saved

    with pytest.raises(Stopped):
        Recover(options).apply(again, images, replace(context, say=stop, job=job))
    fresh, images, _ = prepared(FILTER)
    said: list[str] = []
    Recover(options).apply(fresh, images, replace(context, say=said.append, job=job))
    assert said[0] == "going on after epoch 2 of 3"
    for name, tensor in block.module.state_dict().items():
        assert torch.equal(tensor, fresh.module.state_dict()[name]), name


@pytest.mark.parametrize("method", ["sr-ste", "maxq"])
def test_settled_masks_change_nothing_when_they_settle_and_stay(method: str) -> None:
    pattern, options = METHODS[method]
    block, _, context = prepared(pattern)
    training = Training(block, RecoverOptions(epochs=4, batch=32, lr=0.05, settle=0.5, **options), context)
    x = data.normalise(context.training.first(16).x, context.architecture)
    block.module.eval()
    training.refresh(1.0)
    before = training.forward(x, training.projected())
    training.settle()
    torch.testing.assert_close(training.forward(x, training.projected()), before)
    masks = {name: mask.clone() for name, mask in training.masks.items()}
    assert all(set(mask.unique().tolist()) == {0.0, 1.0} for mask in masks.values())
    training.run()
    training.finish()
    for name, mask in masks.items():
        assert torch.equal(training.masks[name], mask)
        assert torch.equal(training.weights[name] != 0, mask != 0), name


def test_a_training_resumed_after_its_masks_have_settled_ends_with_the_same_weights(tmp_path: Path) -> None:
    pattern, options = METHODS["maxq"]
    settings = RecoverOptions(epochs=4, batch=64, lr=0.05, settle=0.25, ramp=0.25, **options)
    whole, images, context = prepared(pattern)
    Recover(settings).apply(whole, images, context)

    def stop(text: str) -> None:
        if text.startswith("epoch 3"):
            raise Stopped  # two epochs are saved, the second with settled masks

    cut, images, _ = prepared(pattern)
    job = Job.open(tmp_path / "cut", {})
    with pytest.raises(Stopped):
        Recover(settings).apply(cut, images, replace(context, say=stop, job=job))
    resumed, images, _ = prepared(pattern)
    Recover(settings).apply(resumed, images, replace(context, job=job))
    for name, tensor in whole.module.state_dict().items():
        assert torch.equal(tensor, resumed.module.state_dict()[name]), name


def test_the_tails_of_binary_weights_are_clamped_to_a_rising_quantile() -> None:
    block, _, context = prepared(Pattern(pattern="binary"))
    for name in block.targets:
        block.module.set_submodule(name, layers.Binary(block.layer(name)))  # type: ignore[arg-type]
    training = Training(block, RecoverOptions(regularizer="recu"), context)
    views, y = next(context.training.epoch(64, context.architecture, context.generator()))
    before = weight_of(block, "conv2").detach().clone()
    for progress, tau in ((1.0, 0.99), (0.0, 0.85)):
        weight_of(block, "conv2").data = before.clone()
        training.progress = progress
        training.regularizer.loss(training, views, y)
        laplace = torch.distributions.Laplace(0.0, before.abs().mean())
        q = float(laplace.icdf(torch.tensor(tau)))
        torch.testing.assert_close(weight_of(block, "conv2").detach(), before.clamp(-q, q))
    assert float(before.abs().max()) > q


def test_every_training_step_is_told() -> None:
    block, images, context = prepared(NM)
    seen: list[tuple[int, int]] = []
    watched = replace(context, step=lambda done, total: seen.append((done, total)))
    Recover(RecoverOptions(epochs=2, batch=64, masks="forward")).apply(block, images, watched)
    assert seen == [(done, 8) for done in range(1, 9)]  # 256 images, two epochs


def test_sparse_decay_reaches_only_what_the_mask_removes() -> None:
    block, _, context = prepared(NM)
    training = Training(block, RecoverOptions(masks="forward", regularizer="sr-ste", strength=0.5), context)
    training.refresh(1.0)
    for weight in training.weights.values():
        weight.grad = torch.zeros_like(weight)
    training.regularizer.after_backward(training)
    for name, weight in training.weights.items():
        assert torch.equal(weight.grad, 0.5 * (1 - training.masks[name]) * weight)


def test_straight_through_gradients_reach_masked_weights_and_hard_ones_do_not() -> None:
    block, _, context = prepared(NM)
    training = Training(block, RecoverOptions(masks="forward"), context)
    training.refresh(1.0)
    views, y = next(context.training.epoch(64, context.architecture, context.generator()))
    training.regularizer.loss(training, views, y).backward()
    weight, mask = training.weights["conv2.weight"], training.masks["conv2.weight"]
    assert weight.grad is not None
    assert (weight.grad[mask == 0] != 0).float().mean() > 0.99


def test_a_training_that_diverges_is_one_sentence() -> None:
    block, images, context = prepared(NM)
    with pytest.raises(NumericError, match=r"NaN or Inf in epoch"):
        Recover(RecoverOptions(epochs=3, batch=32, lr=1e30, masks="forward")).apply(block, images, context)


def test_a_pupil_is_held_against_labels_and_the_float_networks_answers() -> None:
    generator = torch.Generator().manual_seed(0)
    x, logits = torch.randn(6, 4, generator=generator), torch.randn(6, 3, generator=generator)
    teacher, y = torch.nn.Linear(4, 3), torch.tensor([0, 2, 1, 1, 0, 2])
    aim = (teacher(x) / 2).softmax(dim=1)
    divergence = (aim * (aim / (logits / 2).softmax(dim=1)).log()).sum(dim=1).mean()
    labels = -logits.softmax(dim=1)[range(6), y].log().mean()
    found = Teaching(0.75, 2.0, [teacher]).error(logits, x, y)
    torch.testing.assert_close(found, 0.25 * labels + 0.75 * 4 * divergence)
    torch.testing.assert_close(Teaching(0.0, 2.0, []).error(logits, x, y), labels)


def test_two_teachers_teach_the_mean_of_their_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 4, generator=generator), torch.zeros(6, dtype=torch.long)
    one, two = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    with torch.no_grad():
        agreed = (one(x) + two(x)) / 2
    assert float(Teaching(1.0, 4.0, [one, two]).error(agreed, x, y)) < 1e-6
    assert float(Teaching(1.0, 4.0, [one, two]).error(one(x), x, y)) > 1e-3


class Counting(torch.nn.Linear):
    asked = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        return super().forward(x)


def test_a_teacher_that_remembers_is_asked_once_about_a_batch_and_says_the_same() -> None:
    x, other = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    teacher = Counting(4, 3)
    forgetful, remembering = Teaching(1.0, 4.0, [teacher]), Teaching(1.0, 4.0, [teacher], remember=True)
    expected = [forgetful.answers(batch) for batch in (x, other)]
    for _ in range(2):
        assert torch.equal(remembering.answers(x), expected[0])
        assert torch.equal(remembering.answers(other), expected[1])
    assert teacher.asked == 2 + 2


def test_views_come_again_with_their_answers_and_resuming_changes_nothing(tmp_path: Path, digits_weights: Path) -> None:
    def trained(job: Job | None, say: Callable[[str], None] = lambda text: None) -> tuple[Block, int]:
        block, images, context = prepared(NM)
        teacher = models.resolve("digits", digits_weights).network
        batches: list[int] = []
        teacher.register_forward_hook(lambda module, x, out: batches.append(len(x[0])))
        options = RecoverOptions(epochs=5, batch=64, masks="forward", distill=1.0, mix=0.5, views=2)
        taught = replace(context, original=lambda: teacher, job=job, say=say)
        Recover(options).apply(block, images, taught)
        return block, len(batches)

    def stop(text: str) -> None:
        if text.startswith("epoch 4"):
            raise Stopped

    whole, asked = trained(None)
    assert asked == 2 * 4  # two views, four batches
    with pytest.raises(Stopped):
        trained(Job.open(tmp_path / "cut", {}), stop)
    resumed, asked = trained(Job.open(tmp_path / "cut", {}))
    assert asked == 2 * 4  # epochs 4 and 5 are one of each view
    for name, tensor in whole.module.state_dict().items():
        assert torch.equal(tensor, resumed.module.state_dict()[name]), name


def test_a_teacher_may_be_any_network_that_is_read_and_sees_images_as_it_was_trained(digits_weights: Path) -> None:
    _, _, context = prepared(NM)
    pupil = models.resolve("digits").network
    (teacher,) = teachers("digits", str(digits_weights), pupil, context)  # the pupil's own weights are random
    other = context.architecture.model_copy(update={"mean": (0.5,), "std": (0.25,)})
    (renormalised,) = teachers("digits", str(digits_weights), pupil, replace(context, architecture=other))
    raw = context.training.first(16).x
    as_trained, as_seen = data.normalise(raw, context.architecture), data.normalise(raw, other)
    torch.testing.assert_close(renormalised(as_seen), teacher(as_trained))
    own = replace(context, original=lambda: models.resolve("digits", digits_weights).network)
    assert len(teachers("digits", str(digits_weights), pupil, own)) == 2


def test_a_teacher_that_cannot_teach_is_refused(digits_weights: Path) -> None:
    block, _, context = prepared(NM)
    pupil = block.module
    with pytest.raises(RequestError, match="random weights"):
        teachers("digits", "", pupil, context)
    with pytest.raises(RequestError, match="10 classes apart, the network 7"):
        teachers("digits", str(digits_weights), DigitsNet(classes=7), context)
    larger = context.architecture.model_copy(update={"input": (1, 16, 16)})
    with pytest.raises(RequestError, match="takes images of"):
        teachers("digits", str(digits_weights), pupil, replace(context, architecture=larger))
    with pytest.raises(RequestError, match="nothing is learnt from"):
        Training(block, RecoverOptions(teacher="digits"), context)


def test_a_pupil_with_random_weights_learns_from_a_teacher_on_mixed_images(digits_weights: Path) -> None:
    block, images, context = prepared(NM, count=1297)
    options = RecoverOptions(
        epochs=6,
        batch=32,
        lr=0.1,
        masks="forward",
        distill=1.0,
        teacher="digits",
        teacher_weights=str(digits_weights),
        mix=0.5,
    )
    Recover(options).apply(block, images, context)
    test = data.load("digits-test", context.architecture)
    assert measure.accuracy(block.module, test, context.architecture) > 0.85  # chance is 0.1; no label was seen


@pytest.mark.parametrize("method", ["sr-ste", "cr-sfp"])
def test_a_pupil_of_its_own_float_network_moves_towards_it_without_labels(method: str) -> None:
    pattern, options = METHODS[method]
    block, images, context = prepared(pattern)
    weights = copy.deepcopy(block.module)
    taught = replace(context, original=lambda: copy.deepcopy(weights))
    settings = RecoverOptions(epochs=4, batch=32, lr=0.05, distill=1.0, bfloat16=True, **options)
    report = Recover(settings).apply(block, images, taught)
    assert report["epoch-4"]["loss"] < 0.8 * report["epoch-1"]["loss"]
    with pytest.raises(RequestError, match="random weights"):
        Training(block, settings, context)


def test_the_gradient_of_signs_is_the_polynomials_at_the_standardised_input() -> None:
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    aim = torch.randn(3, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = layers.Signs.apply(x)
    assert torch.equal(out, torch.where(x >= 0, 1.0, -1.0).double())
    (found,) = torch.autograd.grad((out * aim).sum(), x)
    scaled = x / (x.flatten(1).var(dim=1) + layers.VARIANCE_FLOOR).sqrt().view(3, 1, 1, 1)
    smooth = torch.where(scaled.abs() < 1, 2 * scaled - scaled * scaled.abs(), scaled.sign())  # derivative 2 - 2 |x|
    torch.testing.assert_close(found, torch.autograd.grad((smooth * aim).sum(), x)[0])


@pytest.mark.parametrize("method", ["sr-ste", "maxq", "cr-sfp"])
def test_averaged_weights_have_the_pattern_and_resuming_changes_nothing(method: str, tmp_path: Path) -> None:
    pattern, options = METHODS[method]
    settings = RecoverOptions(epochs=4, batch=64, lr=0.05, rest=0.5, average=0.25, **{**options, "settle": 0.5})
    whole, images, context = prepared(pattern)
    training = Training(whole, settings, context)
    training.run()
    mean = [tensor.clone() for tensor in training.average.means]  # type: ignore[union-attr]
    training.finish()
    for weight in training.weights.values():
        position = [id(p) for p in training._parameters()].index(id(weight))
        kept = weight != 0
        torch.testing.assert_close(weight[kept], mean[position][kept])
        if pattern.kind == "nm":
            assert (to_matrix(weight.detach()).view(-1, 4) != 0).sum(dim=1).max() <= 2
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(0.025, rel=0.15)

    def stop(text: str) -> None:
        if text.startswith("epoch 4"):
            raise Stopped

    cut, images, _ = prepared(pattern)
    job = Job.open(tmp_path / "cut", {})
    with pytest.raises(Stopped):
        Recover(settings).apply(cut, images, replace(context, say=stop, job=job))
    resumed, images, _ = prepared(pattern)
    Recover(settings).apply(resumed, images, replace(context, job=job))
    for name, tensor in whole.module.state_dict().items():
        assert torch.equal(tensor, resumed.module.state_dict()[name]), name


def test_a_moving_average_weighs_every_step_less_the_older_it_is() -> None:
    steps = [torch.randn(3, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    average = Average(4.0)
    for weight in steps:
        average.add([weight])
    parts = [0.75**6] + [0.25 * 0.75 ** (5 - i) for i in range(6)]  # of the beginning, and of every step
    torch.testing.assert_close(average.means[0], sum(p * w for p, w in zip(parts, [steps[0], *steps], strict=True)))
