"""The report's facts about a checkpoint: layers, sizes, a small generation, the method, where it comes from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

import yaml

from qtoolkit.evals.report import plots
from qtoolkit.evals.report.page import Code, Figure, Section, Table
from qtoolkit.evals.report.words import duration, short_name, size
from qtoolkit.evals.results import EvalResult

SHOWN = 6  # layers in the table beside the figure
WORST = 20  # layers in a ranking where a table of blocks does not fit


def layers(result: EvalResult) -> Section | None:
    """Show every quantized layer's error, and what stayed in float and why."""
    if not result.manifest or not (known := result.manifest.errors):
        return None  # another tool quantized it, and did not say what that cost
    layers, kept = result.manifest.layers, result.manifest.unquantized
    errors, worst = sorted(known.values()), max(known, key=lambda name: known[name])
    text = (
        f"{len(layers)} layers were quantized. The error of a layer is the energy of what its output lost, as a share "
        f"of the output's, on the calibration tokens: {errors[len(errors) // 2]:.2%} in the median, "
        f"{known[worst]:.2%} at worst ({worst}).",
    )
    rows = tuple((row.name, f"{row.shape[0]} x {row.shape[1]}", f"{known[row.name]:.3%}") for row in layers)
    largest = sorted(rows, key=lambda row: -known[row[0]])[:SHOWN]
    tables = [
        Table(("largest errors", "shape", "error"), tuple(largest)),
        Table(("layer", "shape", "error"), rows, folded=f"All {len(layers)} layers"),
    ]
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
    return Section("Layers", text, (layer_figure(known),), tuple(tables))


def layer_figure(errors: Mapping[str, float]) -> Figure:
    """Draw blocks against kinds of layer where names say so (``model.layers.3.mlp.up_proj``), else the worst ones."""
    found: dict[str, dict[int, float]] = {}
    for name, error in errors.items():
        if match := re.fullmatch(r"\D*\.(\d+)\.(?:\w+\.)*?(\w+)", name):
            found.setdefault(match[2], {})[int(match[1])] = error
    blocks = sorted({block for row in found.values() for block in row})
    if sum(map(len, found.values())) == len(errors) and len(found) <= WORST and len(blocks) > 1:
        values = [[row.get(block) for block in blocks] for row in found.values()]
        unit = "In percent." if len(blocks) <= 8 else f"The strongest tint is {max(errors.values()):.2%}."
        return Figure(
            partial(plots.cells, list(found), [str(block) for block in blocks], values, "block"),
            "Error of each layer",
            unit,
        )
    worst = sorted(errors.items(), key=lambda pair: -pair[1])[:WORST]
    rows = [(name, error, f"{error:.2%}") for name, error in worst]
    return Figure(partial(plots.ranking, rows), f"The {len(worst)} layers with the largest error")


def sizes(result: EvalResult) -> Section | None:
    """Show the size of the weight files before and after."""
    if not (manifest := result.manifest):
        return None
    rows = [
        ("float", float(manifest.bytes_before), size(manifest.bytes_before)),
        (manifest.scheme.name, float(manifest.bytes_after), size(manifest.bytes_after)),
    ]
    weights: dict[int, int] = {}
    for layer in manifest.layers:
        bits = layer.parsed_scheme.weight_bits
        weights[bits] = weights.get(bits, 0) + layer.shape[0] * layer.shape[1]
    groups = sum(layer.shape[0] * layer.parsed_scheme.groups(layer.shape[1]) for layer in manifest.layers)
    counts = " and ".join(f"{count:,} weights are {bits}-bit integers" for bits, count in sorted(weights.items()))
    text = (f"{counts} with {groups:,} scales; embeddings, norms and what is listed as kept stay in float.",)
    table = Table(
        ("", "bytes", "share"),
        tuple((name, f"{int(value):,}", f"{value / manifest.bytes_before:.0%}") for name, value, _ in rows),
    )
    return Section("Size", text, (Figure(partial(plots.bars, rows), "Weight files"),), (table,))


def latency(result: EvalResult) -> Section | None:
    """Show the timing of a small generation."""
    if not (mine := result.latency):
        return None
    rows = []
    for scores in (result.reference, result):
        if scores and (found := scores.latency):
            speed = f"{found.tokens_per_second:.1f}"
            rows.append((short_name(scores), duration(found.first_token_seconds), speed, f"{found.spread:.0%}"))
    text = (
        f"One greedy generation of {mine.new_tokens} tokens after {mine.prompt_tokens} in transformers, batch 1, "
        "median of three. It tells a broken kernel from a working one; serving speed is another measurement.",
    )
    return Section(
        "A small generation", text, (), (Table(("model", "first token", "tokens/s", "spread"), tuple(rows)),)
    )


def measured(result: EvalResult) -> Section | None:
    """Say in words what was done."""
    lines = []
    if first := next(iter(result.perplexity.values()), None):
        lines.append(
            f"Perplexity: the text is tokenized as a whole and cut into windows of {first.window} tokens that do not "
            "overlap; every token but the first of a window is predicted. Per word divides the same total by "
            "whitespace words."
        )
    if result.reference:
        lines.append("The float model reads the same windows and documents, so differences are paired.")
    if result.reference_is_source is False:
        lines.append(
            "The checkpoint was not made from this reference, so the differences are not those of quantization alone."
        )
    if result.limit is not None:
        lines.append("Tasks were cut short by --limit: their figures are not those of the whole task.")
    return Section("How it was measured", tuple(lines)) if lines else None


def provenance(result: EvalResult) -> Section:
    """List where the checkpoint and the figures come from."""
    manifest = result.manifest
    facts = [("model", result.name), ("activations and float weights", result.dtype)]
    code: tuple[Code, ...] = ()
    if manifest:
        revision = f" at {manifest.revision}" if manifest.revision else ""
        facts += [
            ("made from", f"{manifest.source}{revision} (digest {manifest.source_digest})"),
            *(("converted", f"from {step.layout}, {step.source}") for step in manifest.converted),
        ]
    if manifest and manifest.recipe:  # else another tool quantized it
        facts += [
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
