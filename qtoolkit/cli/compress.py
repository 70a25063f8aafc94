"""`qtoolkit compress`: an image classifier in, a smaller one out."""

from __future__ import annotations

from typing import Annotated

import typer

from qtoolkit.cli import output


def command(
    model: Annotated[str, typer.Argument(help="Vision model; `qtoolkit list vision` shows them.")],
    out: Annotated[str, typer.Option("-o", "--output", help="Folder to write.")] = "",
    recipe: Annotated[str, typer.Option(help="Preset name or YAML file.")] = "nm",
    weights: Annotated[str, typer.Option(help="Trained weights: .npz or .safetensors.")] = "",
    data: Annotated[str, typer.Option(help="Training images: .npz, folder of classes, hub data set, digits.")] = "",
    test: Annotated[str, typer.Option(help="Test images, to measure accuracy before and after.")] = "",
    pattern: Annotated[str, typer.Option(help="2:4, 4:8, 1x16, filter, binary, debut ...")] = "",
    rate: Annotated[float | None, typer.Option(help="Part of filters or 1xN blocks to remove.")] = None,
    epochs: Annotated[int, typer.Option(help="Training epochs of the step recover.")] = 0,
    samples: Annotated[int, typer.Option(help="Calibration images.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="step.key=value, any recipe value.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over; replace a finished checkpoint.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compress an image classifier: prune filters, sparsify, binarize or factor its layers."""
    from qtoolkit import recipe as recipes
    from qtoolkit.errors import RequestError
    from qtoolkit.vision.record import VisionRecipe

    options = {
        "scheme.pattern": pattern or None,
        "scheme.rate": rate,
        "calibration.data": data or None,
        "calibration.samples": samples or None,
        "calibration.seed": seed,
        "recover.epochs": epochs or None,
    }
    changes = {key: value for key, value in options.items() if value is not None}
    changes |= recipes.parse_set(settings or [])
    chosen = recipes.load(recipe, changes, VisionRecipe)
    if dry_run:
        if as_json:
            output.emit({"ok": True, "model": model, "digest": chosen.digest, "recipe": chosen.model_dump()})
        else:
            output.result(f"# {model}, digest {chosen.digest}\n{chosen.to_yaml()}".rstrip())
        return
    if not out:
        raise RequestError("No output folder was given.", "Add -o DIR.")
    from qtoolkit.vision.pipeline import compress

    result = compress(model, chosen, out, weights=weights or None, test=test or None, fresh=fresh, say=output.note)
    if as_json:
        output.emit(result.to_json())
        return
    found = result.figures
    accuracy = ""
    if "accuracy_after" in found:
        before = f"{found['accuracy_before']:.2%} -> " if "accuracy_before" in found else ""
        accuracy = f", accuracy {before}{found['accuracy_after']:.2%}"
    output.result(
        f"{result.output}: {result.scheme}, {len(result.layers)} layers{accuracy}"
        f", {output.megabytes(result.bytes_before)} -> {output.megabytes(result.bytes_after)}"
        f", multiply-adds {found['multiply_adds_before'] / 1e6:.1f} M -> {found['multiply_adds_after'] / 1e6:.1f} M"
        f", {output.seconds(result.seconds)}"
    )
