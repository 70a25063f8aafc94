"""`qtoolkit inspect`: what a checkpoint is, where it comes from, and how much each layer lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from qtoolkit.cli import output

if TYPE_CHECKING:
    from qtoolkit.checkpoint import Manifest


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
    errors = sorted((layer.error, layer.name) for layer in manifest.layers)
    revision = f" at {manifest.revision}" if manifest.revision else ""
    steps = ", ".join(manifest.recipe.get("steps", {}))
    lines = [
        f"{path}: complete",
        f"  model      {manifest.source}{revision}",
        f"  scheme     {manifest.scheme.name}, packing {', '.join(manifest.packing)}",
        f"  recipe     {manifest.recipe.get('name')} ({steps}), digest {manifest.digest}, seed {manifest.seed}",
        f"  calibrated on {manifest.calibration_tokens} {'images' if manifest.kind == 'vision' else 'tokens'}",
        f"  size       {output.megabytes(manifest.bytes_before)} -> {output.megabytes(manifest.bytes_after)}",
        f"  layers     {len(manifest.layers)} quantized, {len(manifest.unquantized)} kept in float",
    ]
    if errors:
        middle = errors[len(errors) // 2]
        lines.append(f"  error      median {middle[0]:.2%}, worst {errors[-1][0]:.2%} ({errors[-1][1]})")
    lines += [f"  kept       {row.name}: {row.reason}" for row in manifest.unquantized]
    if every_layer:
        lines += [
            f"  {row.name:<44} {row.scheme:<14} {row.shape[0]:>6} x {row.shape[1]:<6} error {row.error:.3%}"
            for row in manifest.layers
        ]
    return lines
