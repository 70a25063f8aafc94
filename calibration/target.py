"""The weight a layer should have had: the one that turns its quantized inputs into the float network's outputs.

Source: asymmetric calibration (GPTAQ, Li et al. 2025), extended by the hidden stream's drift. With x what the layer
gets, y what it gets in the float network, and d what the stream it adds to lacks, least squares over the tokens of
|W* x - (W y + d)|^2 gives W* = W + sum (W y + d - W x) x^T (sum x x^T + damping)^-1.
Published code takes the full step. Few calibration tokens overfit it, so strength and damping are chosen by how well
the step does on tokens that it was not fitted to. A layer of many outputs is judged by random combinations of them,
whose squares are those of all outputs on the mean: the choice then costs a part of the step itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtoolkit.calibration import products
from qtoolkit.calibration.moments import HeldOut, Moments, Seen
from qtoolkit.calibration.triangles import Factor

DAMPINGS = (0.01, 1.0)  # parts of the Hessian's mean diagonal, beside what shrinks it; strengths lie between
STRENGTHS = (1.0, 0.75, 0.5, 0.25)
OUTPUTS = 512  # combinations that a layer of more outputs is judged by


@dataclass(frozen=True)
class Choice:
    """How far to go towards W*: damping of the least squares, and strength, the part of the step that is taken."""

    damping: float = DAMPINGS[-1]
    strength: float = 0.0


def aims(seen: Seen) -> list[tuple[Tensor, Choice]]:
    """Return for every layer that reads the input ``seen`` the weight to aim at [n, k], and how it was chosen.

    The choice is made on held-out tokens, the step then taken with all of them: ``seen.fit`` holds them all afterwards.
    """
    choices = choose(seen.fit, seen.check)
    moments = seen.all()
    found = list(moments.weights)
    for damping in sorted({choice.damping for choice in choices if choice.strength}):
        with moments.hessian.factored(damping) as factor:
            for index, choice in enumerate(choices):
                if factor is not None and choice.strength and choice.damping == damping:
                    step = solved(factor, moments.pull(index))
                    found[index] = step.mul_(choice.strength).add_(moments.weights[index])
    return list(zip(found, choices, strict=True))


def choose(fit: Moments, check: HeldOut) -> list[Choice]:
    """Return for every layer the damping and strength with the least error on ``check`` of a step fitted to ``fit``.

    A step S changes the held-out error by tr(S H S^T) - 2 tr(S P^T), with H and P of the held-out tokens: a parabola
    in its strength. No step at all is one of the choices.
    """
    best = [Choice() for _ in fit.weights]
    if not check.tokens:
        return best
    lost = [0.0 for _ in fit.weights]
    mixes = [combinations(len(weight)).to(weight) for weight in fit.weights]
    pulls, fitted = ([each.pull(index, mix) for index, mix in enumerate(mixes)] for each in (check, fit))
    few = fit.tokens < len(fit.hessian.mean)  # than inputs: a step overfits, and the one held back most the least
    for damping in sorted(DAMPINGS, reverse=few):
        with fit.hessian.factored(damping) as factor:
            if factor is None:
                continue
            for index, (learnt, held) in enumerate(zip(fitted, pulls, strict=True)):
                step = solved(factor, learnt.clone())
                bend = check.bend(step)
                slope = float((step * held).sum())
                for strength in STRENGTHS:
                    change = strength * strength * bend - 2 * strength * slope
                    if change < lost[index]:
                        best[index], lost[index] = Choice(damping, strength), change
        strengths = {choice.strength for choice in best}
        if strengths == {0.0 if few else STRENGTHS[0]}:
            break  # nothing is overfitted, more damping would only hold back; or less would overfit even more
    return best


def combinations(n: int, wanted: int = OUTPUTS) -> Tensor:
    """Return combinations R [wanted, n] of n outputs, R^T R the identity on the mean; where n is small, the identity.

    Source: random signs for the trace of a matrix (Hutchinson 1990).
    """
    if n <= OUTPUTS:
        return torch.eye(n, device="cpu")
    draw = torch.Generator("cpu").manual_seed(0)
    signs = torch.randint(0, 2, (wanted, n), generator=draw, device="cpu", dtype=torch.float32).mul_(2).sub_(1)
    return signs.div_(wanted**0.5)


def solved(factor: Factor, pull: Tensor) -> Tensor:
    """Return the full step W* - W of a layer, float32 [n, k], in the place of its ``pull``.

    Products may be rough: what that takes from a step's gain is small, even where inputs have little but their mean.
    """
    with products.rough():
        return factor.solved(pull)
