"""The report's section on where the error comes from: weights, activations, and what earlier layers changed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from statistics import fmean

from qtoolkit.checkpoint import LayerRecord
from qtoolkit.evals.report import plots
from qtoolkit.evals.report.page import Figure, Section, Table
from qtoolkit.evals.results import EvalResult

PARTS = {
    "weight_error": "weights",
    "activation_error": "activations",
    "both_error": "both",
    "inherited_error": "inherited",
}
KINDS = 16  # kinds of layer that a figure has room for


def section(result: EvalResult) -> Section | None:
    """Show each layer's error split into its parts; nothing for checkpoints that did not measure them."""
    found = result.manifest.layers if result.manifest else ()
    layers = [row for row in found if PARTS.keys() <= row.figures.keys()]
    if not layers:
        return None
    kinds = by_kind(layers)
    weights, activations = (fmean(row.figures[name] for row in layers) for name in ("weight_error", "activation_error"))
    more = "weights" if weights >= activations else "activations"
    text = (
        f"Most of the loss comes from the {more}: on average over the layers {weights:.3%} of an output's energy is "
        f"lost by the integer weights alone and {activations:.3%} by rounding the inputs to int8 alone, on a sample of "
        "the calibration tokens. Inherited is what quantizing earlier layers changed in the output, before the layer "
        "makes up for a part of it.",
    )
    head = ("kind of layer", *PARTS.values())
    rows = tuple((kind, *(f"{value:.3%}" for value in values)) for kind, values in kinds.items())
    every = tuple((row.name, *(f"{row.figures[name]:.3%}" for name in PARTS)) for row in layers)
    figures: tuple[Figure, ...] = ()
    if len(kinds) <= KINDS:
        drawn = [(kind, values[0], values[1], values[3]) for kind, values in kinds.items()]
        figures = (
            Figure(
                partial(plots.parts, drawn),
                "Parts of the error by kind of layer",
                "Bars: weights (strong) and activations (pale). Rings: inherited from earlier layers. Percent of the "
                "output's energy, mean over the blocks.",
            ),
        )
    tables = (Table(head, rows), Table(("layer", *PARTS.values()), every, folded=f"All {len(layers)} layers"))
    return Section("Where the error comes from", text, figures, tables)


def by_kind(layers: Sequence[LayerRecord]) -> dict[str, tuple[float, ...]]:
    """Return for each kind of layer (``down_proj``) the mean of every part over the blocks, as ``PARTS`` has them."""
    found: dict[str, list[LayerRecord]] = {}
    for layer in layers:
        found.setdefault(re.sub(r".*\.\d+\.(?:\w+\.)*", "", layer.name), []).append(layer)
    return {kind: tuple(fmean(row.figures[name] for row in rows) for name in PARTS) for kind, rows in found.items()}
