"""`qtoolkit compress`: an image classifier in, a smaller one out."""

from __future__ import annotations

from typing import Annotated

import typer

from qtoolkit.cli import output


def command(
    model: Annotated[
        str, typer.Argument(help="`qtoolkit list vision`, or a transformers classifier: folder, hub name.")
    ],
    out: Annotated[str, typer.Option("-o", "--output", help="Folder to write.")] = "",
    recipe: Annotated[str, typer.Option(help="Preset name or YAML file.")] = "nm",
    weights: Annotated[str, typer.Option(help="Trained weights: .npz or .safetensors.")] = "",
    data: Annotated[
        str | None, typer.Option(help="Training images: .npz, folder of classes, hub data set, digits.")
    ] = None,
    test: Annotated[str, typer.Option(help="Test images, to measure accuracy before and after.")] = "",
    pattern: Annotated[str, typer.Option(help="2:4, 4:8, 1x16, filter, binary, debut ...")] = "",
    rate: Annotated[float | None, typer.Option(help="Part of filters or 1xN blocks to remove.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Training epochs of the step recover.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Calibration images.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="step.key=value, any recipe value; wins over other options.")
    ] = None,
    onnx: Annotated[str, typer.Option(help="Write the result as ONNX, too; alone for a folder that is done.")] = "",
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
        "calibration.data": data,
        "calibration.samples": samples,
        "calibration.seed": seed,
        "recover.epochs": epochs,
    }
    changes = {key: value for key, value in options.items() if value is not None}
    changes |= recipes.parse_set(settings or [])
    chosen = recipes.load(recipe, changes, VisionRecipe)
    if dry_run:
        from qtoolkit.pipeline import build_transforms

        build_transforms(chosen)  # refuses unknown steps and options
        if as_json:
            output.emit({"ok": True, "model": model, "digest": chosen.digest, "recipe": chosen.model_dump()})
        else:
            output.result(f"# {model}, digest {chosen.digest}\n{chosen.to_yaml()}".rstrip())
        return
    if onnx and not out:
        _export(model, onnx, as_json)
        return
    if not out:
        raise RequestError("No output folder was given.", "Add -o DIR.")
    from qtoolkit.vision.models import table
    from qtoolkit.vision.pipeline import compress

    if model not in table():
        output.quiet_libraries()
    with Steps() as bar:
        result = compress(
            model, chosen, out, weights=weights or None, test=test or None, fresh=fresh, say=bar.say, step=bar.step
        )
    exported = to_onnx(out, onnx) if onnx else {}
    if as_json:
        output.emit({**result.to_json(), **exported})
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
    if exported:
        output.result(_line(exported))


class Steps:
    """The run's lines; on a terminal a bar of training steps below them."""

    def __enter__(self) -> Steps:
        self.bar = output.bar()
        self.say = output.note if self.bar is None else self.bar.console.print
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def step(self, done: int, total: int) -> None:
        """Move the bar."""
        if self.bar is not None:
            if not self.bar.task_ids:
                self.bar.add_task("training", total=total)
            self.bar.update(self.bar.task_ids[0], completed=done)


def to_onnx(folder: str, file: str) -> dict[str, str | float | None]:
    """Write a compressed folder as ONNX and return what to tell: the file, and how far onnxruntime's answers are."""
    from qtoolkit.vision import export, runtime

    output.quiet_libraries()
    loaded = runtime.load(folder)
    path = export.to_onnx(loaded, file)
    return {"onnx": str(path), "onnx_difference": export.difference(loaded, path)}


def _export(folder: str, file: str, as_json: bool) -> None:
    exported = to_onnx(folder, file)
    if as_json:
        output.emit({"ok": True, **exported})
    else:
        output.result(_line(exported))


def _line(exported: dict[str, str | float | None]) -> str:
    apart = exported["onnx_difference"]
    checked = "not checked: onnxruntime is missing" if apart is None else f"onnxruntime's logits differ by {apart:.1e}"
    return f"{exported['onnx']}: {checked}"
