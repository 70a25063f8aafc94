"""The weight that compensation aims at, and its choice, against float64 least squares over the tokens themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qtoolkit.calibration import losses, target
from qtoolkit.calibration.capture import round_tokens
from qtoolkit.calibration.hessian import Hessian
from qtoolkit.calibration.moments import HeldOut, Moments, Seen
from qtoolkit.calibration.twin import Inputs

K, N = 24, 10


def made(tokens: int, noise: float, seed: int = 0, drift: bool = True) -> tuple[Inputs, Tensor]:
    """Return inputs whose float and quantized forms differ by a linear map and by noise, and a weight."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=torch.Generator().manual_seed(99))
    wanted = torch.randn(tokens, K, generator=draw) @ mix
    bent = torch.eye(K) + 0.1 * torch.randn(K, K, generator=torch.Generator().manual_seed(98))
    seen = wanted @ bent + noise * torch.randn(tokens, K, generator=draw)
    lacking = seen @ torch.randn(K, N, generator=torch.Generator().manual_seed(97)) * 0.2 if drift else None
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(96))
    return Inputs(seen, (seen * 8).round() / 8, wanted, lacking), weight


def moments(inputs: Inputs, weights: list[Tensor], parts: int = 3) -> Moments:
    return _filled(Moments(weights), inputs, parts)


def held_out(inputs: Inputs, weights: list[Tensor], parts: int = 3) -> HeldOut:
    return _filled(HeldOut(Moments(weights), len(inputs.served)), inputs, parts)


def _filled(found: Any, inputs: Inputs, parts: int) -> Any:
    for rows in torch.arange(len(inputs.served)).chunk(parts):
        drift = None if inputs.drift is None else inputs.drift[rows]
        found.update(inputs.served[rows], inputs.wanted[rows], drift)
    return found


def full_step(found: Moments, damping: float) -> Tensor:
    with found.hessian.factored(damping) as factor:
        assert factor is not None
        return target.solved(factor, found.pull(0))


@pytest.mark.parametrize("drift", [True, False])
def test_the_full_step_is_least_squares_over_the_tokens(drift: bool) -> None:
    inputs, weight = made(400, 0.5, drift=drift)
    x, wanted = inputs.served.double(), inputs.wanted.double() @ weight.double().T
    if inputs.drift is not None:
        wanted += inputs.drift.double()
    damping = 0.01 * 2 / len(x) * x.square().sum(dim=0).mean()
    ridge = damping * len(x) / 2 * torch.eye(K, dtype=torch.float64)
    # least squares of W* x = wanted with the damping pulling W* towards W
    expected = torch.linalg.solve(x.T @ x + ridge, x.T @ wanted + ridge @ weight.double().T).T
    found = weight + full_step(moments(inputs, [weight]), 0.01)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_the_choice_is_the_least_error_on_tokens_that_were_not_fitted() -> None:
    """Few noisy tokens: the full, undamped step overfits, and the choice says so."""
    inputs, weight = made(40, 3.0)
    fresh, _ = made(4000, 3.0, seed=1)
    fit, check = moments(inputs, [weight]), held_out(fresh, [weight])
    (choice,) = target.choose(fit, check)

    def error(damping: float, strength: float) -> float:
        aim = weight + strength * full_step(fit, damping)
        assert fresh.drift is not None
        lack = fresh.served @ aim.T - fresh.wanted @ weight.T - fresh.drift
        return float(lack.double().square().sum())

    every = {(d, s): error(d, s) for d in target.DAMPINGS for s in (*target.STRENGTHS, 0.0)}
    assert (choice.damping, choice.strength) == min(every, key=lambda pair: every[pair])
    assert every[choice.damping, choice.strength] < 0.9 * error(0.001, 1.0)


def test_more_damping_is_not_tried_where_the_full_step_is_best(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, weight = made(4000, 0.1)
    fresh, _ = made(4000, 0.1, seed=1)
    tried: list[float] = []
    factored = Hessian.factored
    monkeypatch.setattr(Hessian, "factored", lambda self, damping: tried.append(damping) or factored(self, damping))
    (choice,) = target.choose(moments(inputs, [weight]), held_out(fresh, [weight]))
    assert choice == target.Choice(target.DAMPINGS[0], 1.0)
    assert tried == [target.DAMPINGS[0]]


@pytest.mark.parametrize(("helps", "wanted"), [(False, [1]), (True, [1, 0])])
def test_of_few_tokens_the_step_that_is_held_back_most_comes_first(
    helps: bool, wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, weight = made(K - 1, 0.1)
    fresh, _ = made(4000, 0.1, seed=1)
    if not helps:
        assert fresh.drift is not None
        fresh = Inputs(fresh.seen, fresh.served, 2 * fresh.served - fresh.wanted, -fresh.drift)
    tried: list[float] = []
    factored = Hessian.factored
    monkeypatch.setattr(Hessian, "factored", lambda self, damping: tried.append(damping) or factored(self, damping))
    (choice,) = target.choose(moments(inputs, [weight]), held_out(fresh, [weight]))
    assert (choice.strength > 0) == helps
    assert tried == [target.DAMPINGS[each] for each in wanted]


def test_no_step_is_taken_where_none_helps() -> None:
    inputs, weight = made(30, 3.0)
    draw = torch.Generator().manual_seed(5)
    other = Inputs(inputs.seen, inputs.served, inputs.served.clone(), torch.randn(30, N, generator=draw))
    (choice,) = target.choose(moments(inputs, [weight]), held_out(other, [weight]))
    reverse = Inputs(inputs.seen, inputs.served, 2 * inputs.served - inputs.wanted, -inputs.drift)  # type: ignore[operator]
    (never,) = target.choose(moments(inputs, [weight]), held_out(reverse, [weight]))
    assert choice.strength <= 0.5
    assert never.strength == 0.0


@pytest.mark.parametrize("room", [10, 41])
@pytest.mark.parametrize("outputs", [N, 3 * N])
def test_tokens_held_out_join_the_others_as_if_they_had_been_there(
    outputs: int, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer outputs than inputs the lack itself is summed, with more the shift of the inputs."""
    monkeypatch.setattr("qtoolkit.calibration.moments.AT_ONCE", 16)
    inputs, weight = made(101, 0.5)
    inputs = Inputs(inputs.seen, round_tokens(inputs.seen), inputs.wanted, inputs.drift)
    weight = weight.repeat(outputs // N, 1)
    drift = inputs.drift
    assert drift is not None
    inputs = Inputs(inputs.seen, inputs.served, inputs.wanted, drift.repeat(1, outputs // N))
    whole, fit = moments(inputs, [weight]), Moments([weight])
    check = HeldOut(fit, room)  # more come than were expected, or as many
    for kind, rows in ((fit, slice(0, 60)), (check, slice(60, 68)), (check, slice(68, None))):
        assert inputs.drift is not None
        kind.update(inputs.served[rows], inputs.wanted[rows], inputs.drift[rows])
    mix = torch.randn(4, outputs, generator=torch.Generator().manual_seed(3))
    alone = check.pull(0, mix)
    check.hand_over()
    assert check.tokens == 0
    assert fit.tokens == whole.tokens == 101
    x, y, d = (t.double() for t in (inputs.served, inputs.wanted, drift.repeat(1, outputs // N)))
    expected = 2 / 101 * ((y - x) @ weight.double().T + d).T @ x
    held = 2 / 41 * mix.double() @ ((y - x)[60:] @ weight.double().T + d[60:]).T @ x[60:]

    def near(found: Tensor, exact: Tensor, part: float) -> bool:
        return bool((found.double() - exact).norm() < part * exact.norm())

    assert near(alone, held, 4e-3)  # what they lack was rounded to bfloat16
    for found, part in ((fit, 4e-3), (whole, 1e-5)):
        assert near(found.hessian.matrix, 2 / 101 * x.T @ x, 1e-5)
        assert near(found.pull(0), expected, part)
        assert near(found.pull(0, mix), mix.double() @ expected, part)


def test_combinations_of_outputs_have_their_squares_on_the_mean() -> None:
    assert torch.equal(target.combinations(8), torch.eye(8))
    mix = target.combinations(4 * target.OUTPUTS)
    lost = torch.randn(4 * target.OUTPUTS, K, generator=torch.Generator().manual_seed(1))
    assert mix.shape == (target.OUTPUTS, 4 * target.OUTPUTS)
    assert float((mix @ lost).square().sum() / lost.square().sum()) == pytest.approx(1, rel=0.1)


def test_a_singular_hessian_and_dead_inputs_give_a_finite_aim() -> None:
    inputs, weight = made(5, 0.5)
    for x in (inputs.seen, inputs.served, inputs.wanted):
        x[:, 3] = 0.0
    ((aim, _),) = target.aims(Seen([weight], [inputs], 5))
    assert aim.isfinite().all()
    assert torch.equal(aim[:, 3], weight[:, 3])  # nothing is known of it


def test_the_error_s_parts_are_those_of_the_outputs() -> None:
    inputs, weight = made(50, 0.5)
    aim, served = weight * 1.1, (weight * 4).round() / 4
    parts = losses.parts(inputs, aim, served - aim) | losses.inherited(inputs, weight, aim)
    x, rounded, a, q = (t.double() for t in (inputs.seen, inputs.served, aim, served))
    energy = (x @ a.T).square().sum()
    assert parts["weight_error"] == pytest.approx(float((x @ (q - a).T).square().sum() / energy), rel=1e-4)
    assert parts["activation_error"] == pytest.approx(float(((rounded - x) @ a.T).square().sum() / energy), rel=1e-4)
    assert parts["both_error"] == pytest.approx(float((rounded @ q.T - x @ a.T).square().sum() / energy), rel=1e-4)


def test_the_errors_parts_are_taken_on_the_first_batch_s_last_tokens() -> None:
    draw = torch.Generator().manual_seed(11)
    batches = [Inputs(*(torch.randn(300, 8, generator=draw) for _ in range(3)), None) for _ in range(2)]
    seen = Seen([torch.randn(4, 8, generator=draw)], iter(batches), 600)
    assert seen.sample is not None
    assert torch.equal(seen.sample.seen, batches[0].seen[-128:])
    assert torch.equal(seen.sample.wanted, batches[0].wanted[-128:])
