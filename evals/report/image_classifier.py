"""What an image classifier's evaluation says, as a page: accuracy and cost before and after, and every layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

import yaml

from qtoolkit.checkpoint import LayerRecord
from qtoolkit.evals.report import plots
from qtoolkit.evals.report.page import Card, Code, Figure, Page, Section, Table
from qtoolkit.evals.report.words import duration, percent, plus_minus, size, title
from qtoolkit.evals.vision import VisionResult

SHOWN = 24  # layers in a figure: more cannot be read
ALIKE = {"cka": "Centred kernel alignment (CKA)", "gbs": "Nearest images in common (GBS)"}


def page(result: VisionResult) -> Page:
    """Return the whole report of one evaluation; a part that was not measured is left out."""
    parts = (accuracy, cost, layers, alike, training, measured, provenance)
    return Page(
        title=title(result.name),
        badge=result.manifest.scheme.name,
        lead=lead(result),
        cards=_cards(result),
        sections=tuple(section for part in parts if (section := part(result))),
        legend=(("float", "float"), (result.manifest.scheme.name, "packed")),
        foot=f"qtoolkit {result.versions.get('qtoolkit', '')}, {result.date[:10]}, {result.machine.processor}.",
    )


def lead(result: VisionResult) -> str:
    """Return the result in one sentence."""
    said = []
    if found := result.accuracy:
        if found.before is not None and found.change is not None:
            verb = "falls" if found.change < 0 else "rises"
            points = f"{abs(found.change) * 100:.2f} points ({percent(found.before)} to {percent(found.value)}"
            said.append(f"accuracy {verb} by {points} of {found.images:,} images)")
        else:
            said.append(f"accuracy is {percent(found.value)} of {found.images:,} images")
    said.append(f"one image needs {_times(*_pair(result, 'multiply_adds'))} the multiply-adds")
    said.append(f"the file takes {_times(result.manifest.bytes_before, result.manifest.bytes_after)} the space")
    text = ", ".join(said[:-1]) + " and " + said[-1]
    return f"Against the float network, {text}."


def accuracy(result: VisionResult) -> Section | None:
    """Show how many test images are recognised."""
    if not (found := result.accuracy):
        return None
    before = plots.Point(found.before) if found.before is not None else None
    mine = plots.Point(found.value * 100, found.error * 100)
    theirs = plots.Point(before.value * 100) if before else None
    figure = Figure(
        partial(plots.pairs, ["accuracy"], [mine], [theirs], [None], "% of the test images"),
        "Accuracy",
        "The whisker is one standard error of the test set's size.",
    )
    rows = [("packed", percent(found.value), f"± {percent(found.error)}")]
    if found.before is not None:
        rows.insert(0, ("float", percent(found.before), ""))
    if found.change is not None:
        rows.append(("change, points", f"{found.change * 100:+.2f}", plus_minus(found.change_error, _points)))
    if found.agreement is not None:
        rows.append(("same class as float", percent(found.agreement), ""))
    return Section("Accuracy", (), (figure,), (Table(("", "", ""), tuple(rows)),))


def cost(result: VisionResult) -> Section:
    """Show parameters, multiply-adds, bytes and time before and after."""
    manifest = result.manifest
    rows = [
        ("parameters", *_pair(result, "parameters"), lambda v: f"{v:,.0f}"),
        ("multiply-adds", *_pair(result, "multiply_adds"), lambda v: f"{v:,.0f}"),
        ("bytes", float(manifest.bytes_before), float(manifest.bytes_after), size),
    ]
    rows += [
        (f"time, batch {timing.batch}", timing.float_seconds, timing.packed_seconds, duration)
        for timing in result.timings
    ]
    table = tuple((name, form(a), form(b), f"{b / a:.2f}") for name, a, b, form in rows)
    left = [(name, b / a, f"{b / a:.0%}") for name, a, b, _ in rows]
    text = ["Multiply-adds are those of convolutions and linear layers; zeros that are not stored are not counted."]
    if result.timings:
        spread = max(max(timing.float_spread, timing.packed_spread) for timing in result.timings)
        text.append(
            f"Times are medians of runs of both networks in turns on this machine, {result.machine.cores} cores; "
            f"the middle half of the runs lay within up to {spread:.0%} of the median."
        )
    figure = Figure(partial(plots.ranking, left), "What is left of the float network")
    return Section("Cost", tuple(text), (figure,), (Table(("", "float", "packed", "ratio"), table),))


def layers(result: VisionResult) -> Section | None:
    """Show what every layer cost and costs, and which layers stayed as they were."""
    rows, kept = result.manifest.layers, result.manifest.unquantized
    if not rows or "multiply_adds_before" not in rows[0].figures:
        return None
    figures = [_twins(rows, "multiply_adds", "Multiply-adds of each layer")]
    if result.layer_seconds:
        times = [(name, *both, f"{both[1] / both[0]:.0%}") for name, both in result.layer_seconds.items()]
        times = sorted(times, key=lambda row: -row[1])[:SHOWN]
        figures.append(
            Figure(partial(plots.twins, _named(times)), "Time of each layer, one image", "Label: packed of float.")
        )
    head = (
        "layer",
        "outputs x inputs",
        "parameters",
        "multiply-adds",
        "bytes",
        "error",
        *ALIKE.values(),
        "ms",
        "before",
        "runs on",
    )
    table = tuple(_row(layer, result) for layer in rows)
    tables = [Table(head, table, folded=f"All {len(rows)} packed layers")]
    if kept:
        reasons = tuple((row.name, row.reason) for row in kept)
        tables.append(Table(("as it was", "why"), reasons, folded=f"{len(kept)} layers as they were", prose=True))
    text = [f"Left out as a whole: {', '.join(result.manifest.dropped)}."] if result.manifest.dropped else []
    if result.kernels:
        counts = Counter(kernel.name for kernel in result.kernels.values())
        text.append(f"Packed layers run on: {', '.join(f'{name} ({count})' for name, count in counts.items())}.")
        why = Counter(kernel.reason for kernel in result.kernels.values() if kernel.reason)
        if why:
            reasons = tuple((reason, str(count)) for reason, count in why.items())
            tables.append(
                Table(("why torch runs them", "layers"), reasons, folded="Layers without a kernel", prose=True)
            )
    return Section("Layers", tuple(text), tuple(figures), tuple(tables))


def alike(result: VisionResult) -> Section | None:
    """Show how alike each layer's outputs still are to the float network's."""
    rows = [row for row in result.manifest.layers if "cka" in row.figures]
    if not rows:
        return None
    least = sorted(rows, key=lambda row: row.figures["cka"])[:SHOWN]
    shown = [row for row in rows if row in least]
    names = _short([row.name for row in shown])
    figures = []
    for name, heading in ALIKE.items():
        if all(name in row.figures for row in shown):
            bars = [
                (label, row.figures[name], f"{row.figures[name]:.3f}") for label, row in zip(names, shown, strict=True)
            ]
            figures.append(Figure(partial(plots.ranking, bars), heading))
    modular = [row for row in rows if "modularity_after" in row.figures]
    tables: tuple[Table, ...] = ()
    if modular:
        table = tuple(
            (row.name, f"{row.figures['modularity_before']:.3f}", f"{row.figures['modularity_after']:.3f}")
            for row in modular
        )
        tables = (
            Table(("layer", "float", "packed"), table, folded="How far each layer keeps classes apart (modularity)"),
        )
    text = (
        "How a layer arranges calibration images against how the float one did: 1 is the same. Turning or scaling all "
        "of its outputs changes neither figure."
        + (f" The {SHOWN} layers least alike of {len(rows)} are drawn." if len(rows) > SHOWN else ""),
    )
    return Section("Likeness to the float network", text, tuple(figures), tables)


def training(result: VisionResult) -> Section | None:
    """Show the loss of every epoch."""
    epochs = [row for row in result.manifest.groups if row.step == "recover" and "loss" in row.figures]
    if not epochs:
        return None
    names = list(epochs[0].figures)
    rows = tuple((row.name.removeprefix("epoch-"), *(f"{row.figures[n]:.4g}" for n in names)) for row in epochs)
    head = ("epoch", *(name.replace("_", " ") for name in names))
    figure = Figure(partial(plots.curve, [row.figures["loss"] for row in epochs], "epoch"), "Training loss")
    return Section("Training", (), (figure,), (Table(head, rows, folded=f"All {len(epochs)} epochs"),))


def measured(result: VisionResult) -> Section | None:
    """Say in words what was done."""
    found = result.accuracy
    if not found:
        return None
    if found.agreement is not None:
        text = "Both networks saw the same test images, so the difference's error is that of paired answers."
    elif found.before is not None:
        text = "Accuracy was measured when the network was compressed, before and after, on the same test images."
    else:
        text = "Accuracy was measured now; without a reference nothing says what the float network reaches here."
    return Section("How it was measured", (text,))


def provenance(result: VisionResult) -> Section:
    """List where the checkpoint and the figures come from."""
    manifest = result.manifest
    facts = [
        ("made from", f"{manifest.source} (digest {manifest.source_digest})"),
        ("recipe", f"{manifest.recipe.get('name', '')}, digest {manifest.digest}, seed {manifest.seed}"),
        ("calibrated on", f"{manifest.calibration_tokens:,} images"),
        ("compressed with", ", ".join(f"{name} {number}" for name, number in manifest.versions.items())),
        ("packed against masked", f"logits differ by {manifest.figures.get('packing_error', 0):.1e} of the largest"),
        ("evaluated with", ", ".join(f"{name} {number}" for name, number in result.versions.items())),
        ("on", f"{result.machine.processor}, {result.machine.cores} cores, {result.machine.device}"),
        ("when", f"{result.date}, {duration(result.seconds)}"),
    ]
    code = Code("Recipe", yaml.safe_dump(manifest.recipe, sort_keys=False).rstrip())
    return Section("Recipe and provenance", (), (), (Table(("", ""), tuple(facts), prose=True),), (code,))


def _cards(result: VisionResult) -> tuple[Card, ...]:
    cards = []
    if found := result.accuracy:
        note = f"of {found.images:,} images"
        if found.change is not None:
            note = f"{found.change * 100:+.2f} points"
        cards.append(Card("Accuracy", percent(found.value), note))
    for label, name in (("Multiply-adds", "multiply_adds"), ("Parameters", "parameters")):
        before, after = _pair(result, name)
        cards.append(Card(label, f"{after / before:.0%}", f"{_count(before)} to {_count(after)}"))
    before, after = result.manifest.bytes_before, result.manifest.bytes_after
    cards.append(Card("File", f"{after / before:.0%}", f"{size(before)} to {size(after)}"))
    if result.timings:
        first = result.timings[0]
        note = f"{duration(first.float_seconds)} to {duration(first.packed_seconds)}, one image"
        cards.append(Card("Time", f"{first.packed_seconds / first.float_seconds:.0%}", note))
    return tuple(cards)


def _twins(rows: Sequence[LayerRecord], name: str, heading: str) -> Figure:
    found = [(row.name, row.figures[f"{name}_before"], row.figures[f"{name}_after"], _share(row, name)) for row in rows]
    if len(found) > SHOWN:
        found = sorted(found, key=lambda row: -row[1])[:SHOWN]
        heading += f", the {SHOWN} largest of {len(rows)}"
    return Figure(partial(plots.twins, _named(found)), heading, "Label: packed of float.")


def _share(row: LayerRecord, name: str) -> str:
    return f"{row.figures[f'{name}_after'] / row.figures[f'{name}_before']:.0%}"


def _row(layer: LayerRecord, result: VisionResult) -> tuple[str, ...]:
    found = layer.figures
    alike = (f"{found[name]:.3f}" if name in found else "" for name in ALIKE)
    times = result.layer_seconds.get(layer.name)
    return (
        layer.name,
        f"{layer.shape[0]} x {layer.shape[1]}",
        f"{found['parameters_after']:,.0f}",
        _count(found["multiply_adds_after"]),
        size(found["bytes_after"]),
        f"{layer.error:.2%}",
        *alike,
        *((f"{times[1] * 1e3:.2f}", f"{times[0] * 1e3:.2f}") if times else ("", "")),
        result.kernels[layer.name].name if layer.name in result.kernels else "",
    )


def _named(rows: Sequence[tuple[str, float, float, str]]) -> list[tuple[str, float, float, str]]:
    """Return rows with names that fit beside a figure."""
    return [(name, *row[1:]) for name, row in zip(_short([row[0] for row in rows]), rows, strict=True)]


def _short(names: Sequence[str]) -> list[str]:
    """Return module names without what all of them begin with, and without words that say nothing."""
    words = [name.split(".") for name in names]
    common = 0
    while len(words) > 1 and all(len(w) > common + 1 and w[common] == words[0][common] for w in words):
        common += 1
    dull = {"layers", "layer", "convolution", "encoder", "attention", "stages"}
    short = [".".join(word for word in w[common:] if word not in dull) or w[-1] for w in words]
    return short if len(set(short)) == len(short) else [".".join(w[common:]) for w in words]


def _pair(result: VisionResult, name: str) -> tuple[float, float]:
    return result.manifest.figures[f"{name}_before"], result.manifest.figures[f"{name}_after"]


def _times(before: float, after: float) -> str:
    return f"{after / before:.0%} of"


def _points(error: float) -> str:
    return f"{error * 100:.2f}"


def _count(value: float) -> str:
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.2f} {unit}"
    return f"{value:.0f}"
