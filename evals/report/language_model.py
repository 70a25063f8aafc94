"""What a language model's evaluation says, as sections of a report."""

from __future__ import annotations

import math
import re
from pathlib import PurePath

import yaml

from qtoolkit.checkpoint import LayerRecord, Manifest
from qtoolkit.evals.divergence import Divergence
from qtoolkit.evals.report import plots
from qtoolkit.evals.report.page import Card, Code, Figure, Page, Section, Table
from qtoolkit.evals.report.words import duration, percent, plus_minus, short, signed_percent, size
from qtoolkit.evals.results import EvalResult, Scores, TaskScore

WORST = 20  # layers in a ranking where a table of blocks does not fit
LEGEND = "Dots are values, whiskers one standard error."


def page(result: EvalResult) -> Page:
    """Return the whole report of one evaluation; a part that was not measured is left out."""
    parts = (_perplexity, _divergence, _tasks, _served, _layers, _sizes, _latency, _measured, _provenance)
    sections = tuple(section for part in parts if (section := part(result)))
    return Page(
        title=title(result.name),
        badge=result.scheme or f"float, {result.dtype}",
        lead=lead(result),
        cards=_cards(result),
        sections=sections,
        legend=_legend(result),
        foot=f"qtoolkit {result.versions.get('qtoolkit', '')}, {result.date[:10]}, {result.machine.processor}.",
    )


def title(name: str) -> str:
    """Return a model's name without the folders before it."""
    return PurePath(name).name or name


def lead(result: EvalResult) -> str:
    """Return the result in one sentence."""
    said = []
    first = next(iter(result.perplexity), None)
    if first and first in result.ppl_change and result.reference:
        change, was = result.ppl_change[first].value, result.reference.perplexity[first].token
        direction = "rises" if change >= 0 else "falls"
        said.append(
            f"perplexity {direction} by {percent(abs(change))} ({was:.2f} to {result.perplexity[first].token:.2f})"
        )
    elif first:
        said.append(f"perplexity is {result.perplexity[first].token:.2f} per token")
    if result.divergence:
        said.append(f"the likeliest next token stays the same in {percent(result.divergence.top1)} of all places")
    if result.manifest:
        said.append(f"the weights take {_ratio(result.manifest):.1f} times less space")
    if not said and result.tasks:
        said.append(f"scored on {', '.join(result.tasks)}")
    text = ", ".join(said[:-1]) + (" and " if len(said) > 1 else "") + said[-1] if said else "nothing was measured"
    compared = f"Against {title(result.reference.name)}, " if result.reference else ""
    return f"{compared}{text}." if compared else f"{text[0].upper()}{text[1:]}."


def _cards(result: EvalResult) -> tuple[Card, ...]:
    cards = []
    for name, score in list(result.perplexity.items())[:1]:
        if name in result.ppl_change:
            change = result.ppl_change[name]
            cards.append(Card("Perplexity", signed_percent(change.value), plus_minus(change.stderr, percent)))
        else:
            cards.append(Card("Perplexity", f"{score.token:.2f}", plus_minus(score.stderr, lambda x: f"{x:.2f}")))
    if found := result.divergence:
        times = (
            f"{found.kl / found.floor.kl:.0f} times the noise floor"
            if found.floor and found.floor.kl
            else "nats per token"
        )
        cards.append(Card("KL divergence", short(found.kl), times))
        cards.append(Card("Same top token", percent(found.top1), f"of {found.tokens} places"))
    if result.task_change:
        changes = [change.value for change in result.task_change.values()]
        count = f"mean of {len(changes)} tasks" if len(changes) > 1 else next(iter(result.task_change))
        cards.append(Card("Tasks", f"{sum(changes) / len(changes) * 100:+.1f}", f"points, {count}"))
    if result.manifest:
        note = f"{size(result.manifest.bytes_before)} to {size(result.manifest.bytes_after)}"
        cards.append(Card("Weights", f"{_ratio(result.manifest):.1f}x smaller", note))
    return tuple(cards)


def _perplexity(result: EvalResult) -> Section | None:
    if not result.perplexity:
        return None
    theirs = result.reference.perplexity if result.reference else {}
    head = ("text", "model", "per token", "± s.e.", "per word", "bits per byte")
    rows = []
    for name, mine in result.perplexity.items():
        for label, score in ((_name(result.reference), theirs.get(name)), (_name(result), mine)):
            if score:
                error = "" if score.stderr is None else f"{score.stderr:.2f}"
                rows.append(
                    (name, label, f"{score.token:.3f}", error, f"{score.word:.2f}", f"{score.bits_per_byte:.4f}")
                )
    tables = [Table(head, tuple(rows))]
    figures = [
        Figure(
            plots.pairs(
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
                    plots.steps(each, point),
                    f"Change of perplexity on {name}, window by window",
                    "Line: the mean; band: its standard error. Both models read the same windows, so this is the sharper figure.",
                )
            )
    if result.ppl_change:
        changed = tuple(
            (name, signed_percent(change.value), plus_minus(change.stderr, percent))
            for name, change in result.ppl_change.items()
        )
        tables.append(Table(("text", "change", "s.e. of the paired change"), changed))
    return Section("Perplexity", (), tuple(figures), tuple(tables))


def _divergence(result: EvalResult) -> Section | None:
    if not (found := result.divergence):
        return None
    rows: list[tuple[str, Divergence]] = [(_name(result), found)]
    text = (
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
        ("model", "mean KL", "± s.e.", "99th percentile", "same top token"),
        tuple((name, short(d.kl), short(d.stderr), short(d.p99), f"{d.top1 * 100:.2f} %") for name, d in rows),
    )
    figures: tuple[Figure, ...] = ()
    drawn = [(name, d.kl, max(d.p99, d.kl)) for name, d in rows if d.kl > 0]
    if drawn:
        figures = (Figure(plots.distances(drawn, packed=len(drawn) - 1), "Distance to the float model"),)
    return Section("Divergence", text, figures, (table,))


def _tasks(result: EvalResult) -> Section | None:
    if not result.tasks:
        return None
    theirs = result.reference.tasks if result.reference else {}
    asked = "all documents" if result.limit is None else f"the first {result.limit} documents"
    rows = []
    for name, mine in result.tasks.items():
        change = result.task_change.get(name)
        delta = "" if change is None else f"{change.value * _scale(mine):+.1f}"
        error = "" if change is None or change.stderr is None else f"{change.stderr * _scale(mine):.1f}"
        for metric in mine.metrics:
            other = theirs.get(name)
            cells = [f"{name}, {metric}", _score(other, metric), _score(mine, metric)]
            rows.append((*cells, *((delta, error) if metric == mine.primary else ("", "")), str(mine.documents)))
    head = ("task", "float", result.scheme or "model", "change", "± s.e.", "documents")
    drawn = [(name, score) for name, score in result.tasks.items() if score.higher_is_better and score.value <= 1]
    figures: tuple[Figure, ...] = ()
    if drawn:
        svg = plots.pairs(
            [name for name, _ in drawn],
            [_point(score, score.primary) for _, score in drawn],
            [_point(theirs[name], score.primary) if name in theirs else None for name, score in drawn],
            [score.chance * 100 if score.chance else None for _, score in drawn],
            "percent right, higher is better",
        )
        figures = (Figure(svg, "Tasks", f"{LEGEND} The dashed line is what guessing scores."),)
    note = (
        f"lm-eval {result.versions.get('lm-eval', '')}, no examples in the prompt, {asked} of each task, on "
        f"{'the running server' if result.backend == 'endpoint' else result.backend}. Accuracies in percent; the error of "
        "the change is that of the paired difference.",
    )
    return Section("Tasks", note, figures, (Table(head, tuple(rows)),))


def _served(result: EvalResult) -> Section | None:
    if not (served := result.served):
        return None
    rows = tuple(
        (name, f"{result.perplexity[name].token:.4f}", f"{found.token:.4f}", signed_percent(served.gap[name], 3))
        for name, found in served.perplexity.items()
    )
    text = (
        f"The same windows, scored by the running server ({served.model} at {served.url}) from its own log probabilities.",
    )
    return Section("Served", text, (), (Table(("text", "our runtime", "server", "difference"), rows),))


def _layers(result: EvalResult) -> Section | None:
    if not result.manifest or not result.manifest.layers:
        return None
    layers, kept = result.manifest.layers, result.manifest.unquantized
    errors = sorted(layer.error for layer in layers)
    worst = max(layers, key=lambda layer: layer.error)
    text = (
        f"{len(layers)} layers were quantized. The error of a layer is the energy of what its output lost, as a share of "
        f"the output's, on the calibration text: {errors[len(errors) // 2]:.2%} in the median, {worst.error:.2%} at worst "
        f"({worst.name}).",
    )
    every = Table(
        ("layer", "shape", "error"),
        tuple((layer.name, f"{layer.shape[0]} x {layer.shape[1]}", f"{layer.error:.3%}") for layer in layers),
        folded=f"All {len(layers)} layers",
    )
    tables = [every]
    if kept:
        reasons = tuple((row.name, row.reason) for row in kept)
        tables.append(
            Table(
                ("kept in float", "why"),
                reasons,
                prose=True,
                folded="" if len(kept) <= 8 else f"{len(kept)} kept in float",
            )
        )
    return Section("Layers", text, (_layer_figure(layers),), tuple(tables))


def _layer_figure(layers: tuple[LayerRecord, ...]) -> Figure:
    """Return blocks against kinds of layer where names say so (``model.layers.3.mlp.up_proj``), else the worst layers."""
    found: dict[str, dict[int, float]] = {}
    for layer in layers:
        if match := re.fullmatch(r"\D*\.(\d+)\.(?:\w+\.)*?(\w+)", layer.name):
            found.setdefault(match[2], {})[int(match[1])] = layer.error
    blocks = sorted({block for row in found.values() for block in row})
    if sum(map(len, found.values())) == len(layers) and len(found) <= WORST and len(blocks) > 1:
        values = [[row.get(block) for block in blocks] for row in found.values()]
        unit = "Percent." if len(blocks) <= 8 else f"The strongest tint is {max(layer.error for layer in layers):.2%}."
        return Figure(
            plots.cells(list(found), [str(block) for block in blocks], values, "block"), "Error of each layer", unit
        )
    worst = sorted(layers, key=lambda layer: -layer.error)[:WORST]
    rows = [(layer.name, layer.error, f"{layer.error:.2%}") for layer in worst]
    return Figure(plots.ranking(rows), f"The {len(worst)} layers with the largest error")


def _sizes(result: EvalResult) -> Section | None:
    if not (manifest := result.manifest):
        return None
    rows = [
        ("float", float(manifest.bytes_before), size(manifest.bytes_before)),
        (manifest.scheme.name, float(manifest.bytes_after), size(manifest.bytes_after)),
    ]
    parameters = sum(layer.shape[0] * layer.shape[1] for layer in manifest.layers)
    groups = sum(layer.shape[0] * manifest.scheme.groups(layer.shape[1]) for layer in manifest.layers)
    text = (
        f"{parameters:,} weights are 4-bit integers with {groups:,} scales; embeddings, norms and what is listed as kept "
        "stay in float.",
    )
    table = Table(
        ("", "bytes", "share"),
        tuple((name, f"{int(value):,}", f"{value / manifest.bytes_before:.0%}") for name, value, _ in rows),
    )
    return Section("Size", text, (Figure(plots.bars(rows), "Weight files"),), (table,))


def _latency(result: EvalResult) -> Section | None:
    if not (mine := result.latency):
        return None
    rows = []
    for scores in (result.reference, result):
        if scores and (found := scores.latency):
            speed = f"{found.tokens_per_second:.1f}"
            rows.append((_name(scores), duration(found.first_token_seconds), speed, f"{found.spread:.0%}"))
    text = (
        f"One greedy generation of {mine.new_tokens} tokens after {mine.prompt_tokens} in transformers, batch 1, median of "
        "three. It tells a broken kernel from a working one; serving speed is another measurement.",
    )
    return Section(
        "A small generation", text, (), (Table(("model", "first token", "tokens/s", "spread"), tuple(rows)),)
    )


def _measured(result: EvalResult) -> Section | None:
    lines = []
    if first := next(iter(result.perplexity.values()), None):
        lines.append(
            f"Perplexity: the text is tokenized as a whole and cut into windows of {first.window} tokens that do not overlap; "
            "every token but the first of a window is predicted. Per word divides the same total by whitespace words."
        )
    if result.reference:
        lines.append("The float model reads the same windows and documents, so differences are paired.")
    if result.limit is not None:
        lines.append("Tasks were cut short by --limit: their figures are not those of the whole task.")
    return Section("How it was measured", tuple(lines)) if lines else None


def _provenance(result: EvalResult) -> Section:
    manifest = result.manifest
    facts = [("model", result.name), ("activations and float weights", result.dtype)]
    code: tuple[Code, ...] = ()
    if manifest:
        revision = f" at {manifest.revision}" if manifest.revision else ""
        facts += [
            ("made from", f"{manifest.source}{revision} (digest {manifest.source_digest})"),
            ("recipe", f"{manifest.recipe.get('name', '')}, digest {manifest.digest}, seed {manifest.seed}"),
            ("calibrated on", f"{manifest.calibration_tokens:,} tokens"),
            ("quantized with", ", ".join(f"{name} {number}" for name, number in manifest.versions.items())),
        ]
        code = (Code("Recipe", yaml.safe_dump(manifest.recipe, sort_keys=False).rstrip()),)
    if result.reference:
        facts.append(("compared with", f"{result.reference.name} ({result.reference.dtype})"))
    facts += [
        ("evaluated with", ", ".join(f"{name} {number}" for name, number in result.versions.items())),
        ("on", f"{result.machine.processor}, {result.machine.cores} cores, {result.machine.device}"),
        ("when", f"{result.date}, {duration(result.seconds)}"),
    ]
    return Section("Recipe and provenance", (), (), (Table(("", ""), tuple(facts), prose=True),), code)


def _name(scores: Scores | None) -> str:
    return "" if scores is None else scores.scheme or "float"


def _legend(result: EvalResult) -> tuple[tuple[str, str], ...]:
    mine = (_name(result), "packed")
    return (("float", "float"), mine) if result.reference or result.manifest else (mine,)


def _ratio(manifest: Manifest) -> float:
    return manifest.bytes_before / max(manifest.bytes_after, 1)


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
