"""Differences between two models that saw the same items, with the standard error of the paired difference."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from qtoolkit.evals.results import Change, Scores


def perplexities(model: Scores, reference: Scores) -> dict[str, Change]:
    """Return the relative change of token perplexity for every text both were measured on.

    The windows are the same, so what is hard in a text cancels: the error of the difference is far below that of
    either perplexity.
    """
    changes = {}
    for name in model.perplexity.keys() & reference.perplexity.keys():
        mine, theirs = model.perplexity[name], reference.perplexity[name]
        pairs = [a - b for a, b in zip(mine.window_nll, theirs.window_nll, strict=True)]
        ratio = mine.token / theirs.token
        error = _stderr(pairs)
        changes[name] = Change(value=ratio - 1, stderr=None if error is None else ratio * error)
    return dict(sorted(changes.items()))


def tasks(model: Scores, reference: Scores) -> dict[str, Change]:
    """Return model minus reference in the primary metric of every task both were scored on."""
    changes = {}
    for name in model.tasks.keys() & reference.tasks.keys():
        mine, theirs = model.tasks[name], reference.tasks[name]
        paired = mine.each and len(mine.each) == len(theirs.each)
        error = _stderr([a - b for a, b in zip(mine.each, theirs.each, strict=True)]) if paired else None
        changes[name] = Change(value=mine.value - theirs.metrics[mine.primary], stderr=error)
    return dict(sorted(changes.items()))


def _stderr(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
