"""The weight a layer should have had: the one that turns its quantized inputs into the float network's outputs.

Source: asymmetric calibration (GPTAQ, Li et al. 2025), extended by the hidden stream's drift. With x what the layer
gets, y what it gets in the float network, and d what the stream it adds to lacks, least squares over the tokens of
|W* x - (W y + d)|^2 gives W* = W + sum (W y + d - W x) x^T (sum x x^T + damping)^-1.
Published code takes the full step. Few calibration tokens overfit it, so strength and damping are chosen by how well
the step does on tokens that it was not fitted to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtoolkit.calibration.moments import Moments, Seen

DAMPINGS = (0.001, 0.01, 0.1, 1.0)  # parts of the Hessian's mean diagonal
STRENGTHS = (1.0, 0.75, 0.5, 0.25)


@dataclass(frozen=True)
class Choice:
    """How far to go towards W*: damping of the least squares, and strength, the part of the step that is taken."""

    damping: float = DAMPINGS[-1]
    strength: float = 0.0


def aims(seen: Seen, weights: Sequence[Tensor]) -> list[tuple[Tensor, Choice]]:
    """Return for every weight float32 [n, k] that reads the input ``seen`` the weight to aim at, and how it was chosen.

    The choice is made on held-out tokens, the step then taken with all of them: ``seen.fit`` holds them all afterwards.
    """
    choices = choose(seen.fit, seen.check, weights)
    moments = seen.all()
    return [
        (weight + choice.strength * solve(moments, weight, choice.damping) if choice.strength else weight, choice)
        for weight, choice in zip(weights, choices, strict=True)
    ]


def choose(fit: Moments, check: Moments, weights: Sequence[Tensor]) -> list[Choice]:
    """Return for every weight the damping and strength with the least error on ``check`` of a step fitted to ``fit``.

    A step S changes the held-out error by tr(S H S^T) - 2 tr(S P^T), with H and P of the held-out tokens: a parabola
    in its strength. No step at all is one of the choices.
    """
    best = [Choice() for _ in weights]
    lost = [0.0 for _ in weights]
    pulls, fitted = ([moments.pull(weight) for weight in weights] for moments in (check, fit))
    for damping in DAMPINGS:
        factor = _factor(fit, damping)
        if factor is None:
            continue
        for index, (learnt, held) in enumerate(zip(fitted, pulls, strict=True)):
            step = torch.cholesky_solve(learnt.T, factor).T
            bend = float(((step @ check.hessian.matrix) * step).sum())
            slope = float((step * held).sum())
            for strength in STRENGTHS:
                change = strength * strength * bend - 2 * strength * slope
                if change < lost[index]:
                    best[index], lost[index] = Choice(damping, strength), change
    return best


def solve(moments: Moments, weight: Tensor, damping: float) -> Tensor:
    """Return the full step W* - W for weight float32 [n, k]; zero where the Hessian stays singular."""
    factor = _factor(moments, damping)
    return torch.zeros_like(weight) if factor is None else torch.cholesky_solve(moments.pull(weight).T, factor).T


def _factor(moments: Moments, damping: float) -> Tensor | None:
    """Return the lower Cholesky factor of the damped Hessian, or None where it is singular."""
    lower, failed = torch.linalg.cholesky_ex(moments.hessian.damped(damping))
    return None if failed else lower
