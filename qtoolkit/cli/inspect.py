"""`qtoolkit inspect`: what a checkpoint is, where it comes from, and how much each layer lost."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from qtoolkit.cli import output

if TYPE_CHECKING:
    from qtoolkit.checkpoint import LayerRecord, Manifest


def command(
    path: Annotated[str, typer.Argument(help="Checkpoint folder.")],
    layers: Annotated[bool, typer.Option("--layers", help="One line for each layer.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a packed checkpoint and show what it holds."""
    from qtoolkit.checkpoint import verify

    manifest = verify(path)
    if as_json:
        output.emit({"ok": True, "path": path, **manifest.model_dump(mode="json")})
        return
    output.result("\n".join(_lines(path, manifest, layers)))


def _lines(path: str, manifest: Manifest, every_layer: bool) -> list[str]:
    errors = sorted((error, name) for name, error in manifest.errors.items())
    revision = f" at {manifest.revision}" if manifest.revision else ""
    lines = [
        f"{path}: complete",
        f"  model      {manifest.source}{revision}",
        f"  scheme     {manifest.scheme.name}, packing {', '.join(manifest.packing)}",
        *(_origin(manifest) if manifest.recipe else ["  recipe     not known: another tool quantized it"]),
        *(f"  converted  from {step.layout}, {step.source}" for step in manifest.converted),
        f"  size       {output.megabytes(manifest.bytes_before)} -> {output.megabytes(manifest.bytes_after)}",
        f"  layers     {len(manifest.layers)} quantized, {len(manifest.unquantized)} kept in float",
    ]
    if errors:
        middle = errors[len(errors) // 2]
        lines.append(f"  error      median {middle[0]:.2%}, worst {errors[-1][0]:.2%} ({errors[-1][1]})")
    if split := [row.figures for row in manifest.layers if "weight_error" in row.figures]:
        means = (sum(row[f"{part}_error"] for row in split) / len(split) for part in ("weight", "activation", "both"))
        lines.append("  from       weights {:.3%}, activations {:.3%}, both {:.3%} (mean over layers)".format(*means))
    if choice := manifest.choice:
        figures = ", ".join(f"{name} {value:.4f}" for name, value in choice.decisive.items())
        lines.append(f"  outliers   {choice.chosen} (divergence: {figures} nats)")
    if budget := manifest.budget:
        kinds = Counter(row.kind for row in budget.rows for _ in row.layers)
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        lines.append(f"  budget     {budget.used:.3f} of {budget.bits:g} bits a weight ({counts})")
    lines += [f"  note       {note}" for note in manifest.notes]
    lines += [f"  kept       {row.name}: {row.reason}" for row in manifest.unquantized]
    if every_layer:
        lines += [
            f"  {row.name:<44} {row.scheme:<14} {row.shape[0]:>6} x {row.shape[1]:<6}{_error(row)}"
            for row in manifest.layers
        ]
    return lines


def _origin(manifest: Manifest) -> list[str]:
    """Return how the checkpoint was quantized."""
    steps = ", ".join(manifest.recipe.get("steps", {}))
    return [
        f"  recipe     {manifest.recipe.get('name')} ({steps}), digest {manifest.digest}, seed {manifest.seed}",
        f"  calibrated on {manifest.calibration_tokens} {'images' if manifest.kind == 'vision' else 'tokens'}",
    ]


def _error(layer: LayerRecord) -> str:
    """Return the layer's error and where it comes from, as far as that was measured."""
    if layer.error is None:
        return ""
    found = layer.figures
    if "weight_error" not in found:
        return f" error {layer.error:.3%}"
    parts = f"weights {found['weight_error']:.3%}, activations {found['activation_error']:.3%}"
    return f" error {layer.error:.3%} ({parts})"
