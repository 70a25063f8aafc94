"""`qtoolkit quantize`: a model in, a packed checkpoint out."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from qtoolkit import memory
from qtoolkit.cli import output


def command(
    model: Annotated[str, typer.Argument(help="Hub name, local folder, or `tiny`, the bundled model.")],
    out: Annotated[str, typer.Option("-o", "--output", help="Folder to write.")] = "",
    w4a8: Annotated[bool, typer.Option("--w4a8", help="The preset w4a8; the default.")] = False,
    recipe: Annotated[str, typer.Option(help="Preset name or YAML file.")] = "",
    group_size: Annotated[str, typer.Option(help="Inputs that share a scale, or 'channel'.")] = "",
    data: Annotated[str | None, typer.Option(help="Calibration text: file, data set name, or 'self'.")] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a window.")] = None,
    outliers: Annotated[str, typer.Option(help="smooth, rotate, both, none, or 'auto': measured.")] = "",
    budget: Annotated[str, typer.Option(help="Bits a weight, such as 4.25bpw: int8 or float where it helps.")] = "",
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; 'auto' takes the GPU where there is one.")] = "auto",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="step.key=value, any recipe value; wins over other options.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over; replace a finished checkpoint.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the request, print the recipe, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Quantize a model to int4 weights and int8 activations."""
    memory.keep_little()  # before PyTorch is imported
    from qtoolkit import recipe as recipes
    from qtoolkit.errors import RequestError

    if w4a8 and recipe:
        raise RequestError("--w4a8 and --recipe were both given.", "Give one of them.")
    options = {
        "scheme.group_size": _group_size(group_size),
        "outliers.method": outliers or None,
        "budget.bits": budget or None,
        "calibration.data": data,
        "calibration.samples": samples,
        "calibration.length": length,
        "calibration.seed": seed,
    }
    changes = {key: value for key, value in options.items() if value is not None}
    changes |= recipes.parse_set(settings or [])
    chosen: recipes.Recipe = recipes.load(recipe or "w4a8", changes)
    if dry_run:
        _dry_run(model, chosen, device, as_json)
        return
    if not out:
        raise RequestError("No output folder was given.", "Add -o DIR.")
    from qtoolkit.lightly import work_alone
    from qtoolkit.pipeline import quantize

    output.quiet_libraries()
    work_alone()
    with Lines(output.note) as progress:
        result = quantize(model, chosen, out, fresh=fresh, progress=progress, device=device)
    if as_json:
        output.emit(result.to_json())
        return
    saved = result.bytes_before / max(result.bytes_after, 1)
    kept = len(result.unquantized)
    output.result(
        f"{result.output}: {result.scheme}, {len(result.layers)} layers"
        + (f" ({kept} kept in float: see qtoolkit inspect)" if kept else "")
        + f", {output.megabytes(result.bytes_before)} -> {output.megabytes(result.bytes_after)} ({saved:.1f}x)"
        + f", {output.seconds(result.seconds)}, peak memory {output.megabytes(result.peak_rss_bytes)}"
    )


def _group_size(text: str) -> str | int | None:
    return None if not text else int(text) if text.isdecimal() else text


def _dry_run(model: str, recipe: Any, device: str, as_json: bool) -> None:
    """Print the recipe; refuse what the run would refuse before it calibrates."""
    from qtoolkit import data, device as devices
    from qtoolkit.pipeline import Run
    from qtoolkit.progress import Silent
    from qtoolkit.source import resolve

    output.quiet_libraries()
    where, source = devices.choose(device), resolve(model)
    data.check(recipe.calibration.data)
    Run(source, recipe, Silent(), where)
    if as_json:
        output.emit({"ok": True, "model": source.name, "digest": recipe.digest, "recipe": recipe.model_dump()})
    else:
        output.result(f"# {source.name}, digest {recipe.digest}\n{recipe.to_yaml()}".rstrip())


class Lines:
    """One line a block: name, error, time left, peak memory; on a terminal a bar below shows where it is."""

    def __init__(self, write: Any) -> None:
        self.write, self.began = write, time.monotonic()
        self.blocks = self.first = self.done = 0
        self.bar: Any = None

    def __enter__(self) -> Lines:
        self.bar = output.bar()
        if self.bar is not None:
            self.write = self.bar.console.print
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def start(self, blocks: int, done: int) -> None:
        """Say how much there is to do."""
        self.blocks, self.first, self.done, self.began = blocks, done, done, time.monotonic()
        if done:
            self.write(f"going on after block {done} of {blocks}")
        if self.bar is not None:
            self.bar.add_task("quantizing", total=blocks, completed=done)

    def say(self, text: str) -> None:
        """Pass a line on."""
        self.write(text)

    def block(self, name: str, error: float) -> None:
        """Report a finished block."""
        from qtoolkit.pipeline import peak_rss_bytes

        self.done += 1
        left = (time.monotonic() - self.began) / (self.done - self.first) * (self.blocks - self.done)
        self.write(
            f"block {self.done}/{self.blocks} {name}: error {error:.2%}, {output.seconds(left)} left, "
            f"peak {output.megabytes(peak_rss_bytes())}"
        )
        if self.bar is not None:
            self.bar.advance(self.bar.task_ids[0])
