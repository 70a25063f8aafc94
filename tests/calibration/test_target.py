"""The weight that compensation aims at, and its choice, against float64 least squares over the tokens themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtoolkit.calibration import losses, target
from qtoolkit.calibration.moments import Moments, Seen
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


def moments(inputs: Inputs, parts: int = 3) -> Moments:
    found = Moments(K)
    for rows in torch.arange(len(inputs.served)).chunk(parts):
        found.update(inputs, slice(int(rows[0]), int(rows[-1]) + 1))
    return found


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
    found = weight + target.solve(moments(inputs), weight, 0.01)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_the_choice_is_the_least_error_on_tokens_that_were_not_fitted() -> None:
    """Few noisy tokens: the full, undamped step overfits, and the choice says so."""
    inputs, weight = made(40, 3.0)
    fresh, _ = made(4000, 3.0, seed=1)
    fit, check = moments(inputs), moments(fresh)
    (choice,) = target.choose(fit, check, [weight])

    def error(damping: float, strength: float) -> float:
        aim = weight + strength * target.solve(fit, weight, damping)
        assert fresh.drift is not None
        lack = fresh.served @ aim.T - fresh.wanted @ weight.T - fresh.drift
        return float(lack.double().square().sum())

    every = {(d, s): error(d, s) for d in target.DAMPINGS for s in (*target.STRENGTHS, 0.0)}
    assert (choice.damping, choice.strength) == min(every, key=lambda pair: every[pair])
    assert every[choice.damping, choice.strength] < 0.9 * every[0.001, 1.0]


def test_no_step_is_taken_where_none_helps() -> None:
    inputs, weight = made(30, 3.0)
    draw = torch.Generator().manual_seed(5)
    other = Inputs(inputs.seen, inputs.served, inputs.served.clone(), torch.randn(30, N, generator=draw))
    (choice,) = target.choose(moments(inputs), moments(other), [weight])
    reverse = Inputs(inputs.seen, inputs.served, 2 * inputs.served - inputs.wanted, -inputs.drift)  # type: ignore[operator]
    (never,) = target.choose(moments(inputs), moments(reverse), [weight])
    assert choice.strength <= 0.5
    assert never.strength == 0.0


def test_moments_of_two_halves_merge_into_those_of_all() -> None:
    inputs, _ = made(101, 0.5)
    whole, left, right = moments(inputs, 1), Moments(K), Moments(K)
    left.update(inputs, slice(0, 60))
    right.update(inputs, slice(60, None))
    left.merge(right)
    assert left.tokens == whole.tokens == 101
    for a, b in ((left.hessian.matrix, whole.hessian.matrix), (left.shift, whole.shift), (left.drift, whole.drift)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_a_singular_hessian_and_dead_inputs_give_a_finite_aim() -> None:
    inputs, weight = made(5, 0.5)
    for x in (inputs.seen, inputs.served, inputs.wanted):
        x[:, 3] = 0.0
    ((aim, _),) = target.aims(Seen(K, [inputs]), [weight])
    assert aim.isfinite().all()
    assert torch.equal(aim[:, 3], weight[:, 3])  # nothing is known of it


def test_the_error_s_parts_are_those_of_the_outputs() -> None:
    inputs, weight = made(50, 0.5)
    aim, served = weight * 1.1, (weight * 4).round() / 4
    parts = losses.parts(inputs, weight, aim, served)
    x, rounded, a, q = (t.double() for t in (inputs.seen, inputs.served, aim, served))
    energy = (x @ a.T).square().sum()
    assert parts["weight_error"] == pytest.approx(float((x @ (q - a).T).square().sum() / energy), rel=1e-4)
    assert parts["activation_error"] == pytest.approx(float(((rounded - x) @ a.T).square().sum() / energy), rel=1e-4)
    assert parts["both_error"] == pytest.approx(float((rounded @ q.T - x @ a.T).square().sum() / energy), rel=1e-4)
