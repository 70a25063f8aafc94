"""Bounds on what was measured: ``--fail-above kl=0.05`` turns an evaluation into a test."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qtoolkit.errors import GateError, RequestError
from qtoolkit.evals.results import EvalResult, TaskScore
from qtoolkit.registry import suggest

Bounds = dict[str, float]


def parse(gates: Sequence[str]) -> Bounds:
    """Read ``metric=value`` strings.

    Raises:
        RequestError: not of that form, or the value is no number.
    """
    bounds: Bounds = {}
    for gate in gates:
        name, equals, value = gate.partition("=")
        try:
            bounds[name.strip()] = float(value)
        except ValueError:
            equals = ""
        if not equals or not name.strip() or math.isnan(bounds[name.strip()]):
            raise RequestError(f"--fail-above {gate!r} is not metric=value.", "For example --fail-above kl=0.05.")
    return bounds


def names(texts: Sequence[str], tasks: Sequence[str], reference: bool, endpoint: bool) -> set[str]:
    """Return the metrics that an evaluation of these texts and tasks will have; higher is worse for every one."""
    known = {f"{figure}.{text}" for text in texts for figure in ("ppl", "word_ppl")}
    known |= {f"{task}.loss" for task in tasks}
    if texts:
        known |= {"ppl", "word_ppl"}  # of the first text
    if reference:
        known |= {f"ppl_change.{text}" for text in texts} | {f"{task}.drop" for task in tasks}
        known |= {"kl", "top1_change", "ppl_change"} if texts else set()
    if endpoint:
        known |= {f"served_gap.{text}" for text in texts} | ({"served_gap"} if texts else set())
    return known


def check_names(bounds: Bounds, known: set[str]) -> None:
    """Refuse a bound on something that will not be measured, before anything runs.

    Raises:
        RequestError: an unknown metric; the hint has the nearest names.
    """
    for name in bounds:
        if name not in known:
            raise RequestError(f"Nothing called {name!r} will be measured.", suggest(name, known))


def metrics(result: EvalResult) -> dict[str, float]:
    """Return every figure that a bound can be set on, by the names of ``names``."""
    found = {f"ppl.{text}": value.token for text, value in result.perplexity.items()}
    found |= {f"word_ppl.{text}": value.word for text, value in result.perplexity.items()}
    found |= {f"ppl_change.{text}": change.value for text, change in result.ppl_change.items()}
    found |= {f"{task}.loss": _loss(score) for task, score in result.tasks.items()}
    for task, change in result.task_change.items():
        found[f"{task}.drop"] = -change.value if result.tasks[task].higher_is_better else change.value
    if result.served:
        found |= {f"served_gap.{text}": abs(gap) for text, gap in result.served.gap.items()}
    if result.divergence:
        found |= {"kl": result.divergence.kl, "top1_change": 1 - result.divergence.top1}
    if first := next(iter(result.perplexity), None):
        for figure in ("ppl", "word_ppl", "ppl_change", "served_gap"):
            if f"{figure}.{first}" in found:
                found[figure] = found[f"{figure}.{first}"]
    return found


def check(result: EvalResult, bounds: Bounds) -> None:
    """Compare the result with its bounds.

    Raises:
        GateError: one or more figures are above their bound; all of them are named with both numbers.
    """
    compare(metrics(result), bounds)


def compare(found: Bounds, bounds: Bounds) -> None:
    """Compare measured figures with their bounds.

    Raises:
        RequestError: a bound on something that was not measured.
        GateError: one or more figures are above their bound.
    """
    check_names(bounds, set(found))
    above = [
        f"{name} is {found[name]:.6g}, above {bound:g}" for name, bound in bounds.items() if not found[name] <= bound
    ]
    if above:
        raise GateError(f"{'; '.join(above)}.", "The report has the details.")


def _loss(score: TaskScore) -> float:
    return 1 - score.value if score.higher_is_better else score.value
