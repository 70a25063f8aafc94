"""The report's figures of quality: perplexity, divergence, tasks, and the served model's perplexity."""

from __future__ import annotations

import math
from functools import partial

from qtoolkit.evals.divergence import Divergence
from qtoolkit.evals.report import plots
from qtoolkit.evals.report.page import Figure, Section, Table
from qtoolkit.evals.report.words import count, percent, plus_minus, short, short_name, signed_percent
from qtoolkit.evals.results import EvalResult, TaskScore

LEGEND = "Dots are values, whiskers one standard error."


def perplexity(result: EvalResult) -> Section | None:
    """Show perplexity per text, its change, and the change window by window."""
    if not result.perplexity:
        return None
    theirs = result.reference.perplexity if result.reference else {}
    head = ("text", "model", "per token", "per word", "bits per byte")
    rows = []
    for name, mine in result.perplexity.items():
        for label, score in ((short_name(result.reference), theirs.get(name)), (short_name(result), mine)):
            if score:
                token = f"{score.token:.2f} {plus_minus(score.stderr, '{:.2f}'.format)}".rstrip()
                rows.append((name, label, token, count(score.word), f"{score.bits_per_byte:.4f}"))
    tables = [Table(head, tuple(rows))]
    figures = [
        Figure(
            partial(
                plots.pairs,
                list(result.perplexity),
                [plots.Point(score.token, score.stderr) for score in result.perplexity.values()],
                [
                    plots.Point(theirs[name].token, theirs[name].stderr) if name in theirs else None
                    for name in result.perplexity
                ],
                [None] * len(result.perplexity),
                "perplexity per token, lower is better",
            ),
            "Perplexity of each text",
            f"{LEGEND} The spread is that between parts of the text, which both models share.",
        )
    ]
    for name, change in list(result.ppl_change.items())[:1]:
        pairs = zip(result.perplexity[name].window_nll, theirs[name].window_nll, strict=True)
        each = [100 * math.expm1(mine - other) for mine, other in pairs]
        if len(each) > 1:
            point = plots.Point(100 * change.value, change.stderr and 100 * change.stderr)
            figures.append(
                Figure(
                    partial(plots.steps, each, point),
                    f"Change of perplexity on {name}, window by window",
                    "Line: the mean; band: its standard error. Both models read the same windows, so this is sharper.",
                )
            )
    if result.ppl_change:
        changed = tuple(
            (name, f"{signed_percent(change.value)} {plus_minus(change.stderr, percent)}".rstrip())
            for name, change in result.ppl_change.items()
        )
        tables.append(Table(("text", "change, ± s.e. of the paired difference"), changed))
    return Section("Perplexity", (), tuple(figures), tuple(tables))


def divergence(result: EvalResult) -> Section | None:
    """Show how far the distributions are apart, beside the noise floor."""
    if not (found := result.divergence):
        return None
    rows: list[tuple[str, Divergence]] = [(short_name(result), found)]
    text: tuple[str, ...] = (
        f"How far the distribution over the next token moves from the float model's, on {found.tokens} places of "
        f"the text {found.text}.",
    )
    if found.floor:
        rows.insert(0, (f"float in {found.floor_dtype}", found.floor))
        text += (
            f"The noise floor is the float model against itself computed in {found.floor_dtype}: "
            "below it nothing can be told from rounding.",
        )
    table = Table(
        ("model", "mean KL", "99th percentile", "same top token"),
        tuple(
            (name, f"{short(d.kl)} {plus_minus(d.stderr, short)}".rstrip(), short(d.p99), percent(d.top1))
            for name, d in rows
        ),
    )
    figures: tuple[Figure, ...] = ()
    drawn = [(name, d.kl, max(d.p99, d.kl)) for name, d in rows if d.kl > 0]
    if drawn:
        figures = (
            Figure(
                partial(plots.distances, drawn, packed=len(drawn) - 1),
                "Distance to the float model",
                "Dot: mean; bar: 99th percentile of all places.",
            ),
        )
    return Section("Divergence", text, figures, (table,))


def tasks(result: EvalResult) -> Section | None:
    """Show every metric of every task, and the primary ones drawn."""
    if not result.tasks:
        return None
    theirs = result.reference.tasks if result.reference else {}
    rows: list[tuple[str, ...]] = []
    for name, mine in result.tasks.items():
        change = result.task_change.get(name)
        delta = f"{change.value * _scale(mine):+.1f}" if change else ""
        if change and change.stderr is not None:
            delta += f" ± {change.stderr * _scale(mine):.1f}"
        for metric in mine.metrics:
            figures = (_score(theirs.get(name), metric), _score(mine, metric))
            rows.append((f"{name}, {metric}", *figures, delta if metric == mine.primary else ""))
    head: tuple[str, ...] = ("task", "float", result.scheme or "model", "change")
    if not result.reference:
        head, rows = (head[0], head[2]), [(row[0], row[2]) for row in rows]
    drawn = [(name, score) for name, score in result.tasks.items() if score.higher_is_better and score.value <= 1]
    drawings: tuple[Figure, ...] = ()
    if drawn:
        draw = partial(
            plots.pairs,
            [name for name, _ in drawn],
            [_point(score, score.primary) for _, score in drawn],
            [_point(theirs[name], score.primary) if name in theirs else None for name, score in drawn],
            [score.chance * 100 if score.chance else None for _, score in drawn],
            "percent right, higher is better",
        )
        drawings = (Figure(draw, "Float against quantized", f"{LEGEND} The dashed line is what guessing scores."),)
    counts = ", ".join(f"{score.documents} of {score.available} {name}" for name, score in result.tasks.items())
    runner = "the running server" if result.backend == "endpoint" else result.backend
    note = (
        f"lm-eval {result.versions.get('lm-eval', '')} on {runner}, no examples in the prompt; documents: {counts}. "
        "Accuracies in percent; the error of a change is that of the paired difference.",
    )
    return Section("Tasks", note, drawings, (Table(head, tuple(rows)),))


def served(result: EvalResult) -> Section | None:
    """Show the served model's perplexity beside the runtime's."""
    if not (server := result.served):
        return None
    rows = tuple(
        (name, f"{result.perplexity[name].token:.4f}", f"{found.token:.4f}", signed_percent(server.gap[name], 3))
        for name, found in server.perplexity.items()
    )
    text = (
        f"The same windows, scored by the running server ({server.model} at {server.url}) from its log probabilities.",
    )
    return Section("Served", text, (), (Table(("text", "our runtime", "server", "difference"), rows),))


def _scale(score: TaskScore) -> float:
    return 100 if score.higher_is_better and score.value <= 1 else 1


def _point(score: TaskScore, metric: str) -> plots.Point:
    error = score.stderr.get(metric)
    return plots.Point(score.metrics[metric] * 100, None if error is None else error * 100)


def _score(score: TaskScore | None, metric: str) -> str:
    if score is None or metric not in score.metrics:
        return ""
    value, error = score.metrics[metric], score.stderr.get(metric)
    if not metric.startswith(("acc", "exact")):
        return f"{value:.4g}"
    return f"{value * 100:.1f}" + ("" if error is None else f" ± {error * 100:.1f}")
