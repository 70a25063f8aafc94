"""`qtoolkit bench`: how fast this machine is, how fast our kernels and their peers are on it, in turns in one run."""

from __future__ import annotations

import math
import os
from typing import Annotated

import typer

from qtoolkit.cli import output

SIDE = 128  # of a matrix, at least, and what both sides are multiples of

app = typer.Typer(help="Time kernels or servers beside their peers, in turns.", rich_markup_mode=None)


@app.command("kernels")
def kernels(
    shapes: Annotated[str, typer.Option(help="KxN, separated by commas.")] = "",
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, separated by commas.")] = "",
    names: Annotated[str, typer.Option(help="Contestants, separated by commas; all that run here by default.")] = "",
    seconds: Annotated[float, typer.Option(help="Time for one shape and number of tokens, all contestants.")] = 2.0,
    peer: Annotated[
        list[str] | None, typer.Option(help="zentorch=PYTHON or llamacpp=PYTHON:FOLDER, in a Python of its own.")
    ] = None,
    folder: Annotated[str, typer.Option("--output", "-o", help="Folder for kernels.json, .md and roofline.svg.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time linear-layer kernels beside this machine's measured bandwidth and integer peak."""
    from pathlib import Path

    from qtoolkit.evals import kernel_bench, kernel_remote, roofline

    sizes = tuple(_shape(word) for word in _words(shapes)) or kernel_bench.SHAPES
    counts = tuple(_number(word, "--tokens", "1,16,256") for word in _words(tokens)) or kernel_bench.TOKENS
    chosen, seconds = tuple(_words(names)) or None, _seconds(seconds)
    with kernel_remote.workers(peer or []) as workers:
        result = kernel_bench.run(sizes, counts, chosen, seconds, output.note, workers)
    if folder:
        output.note(f"wrote {roofline.write(result, Path(folder))}")
    if as_json:
        output.emit({"ok": True, **result})
    else:
        output.result(kernel_bench.table(result))


@app.command("vision-kernels")
def vision_kernels(
    seconds: Annotated[float, typer.Option(help="Time for one layer, all contestants.")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time binary and sparse vision layers beside float32, int8, and the machine's measured limits."""
    from qtoolkit.evals import vision_kernel_bench

    result = vision_kernel_bench.run(seconds=_seconds(seconds), progress=output.note)
    if as_json:
        output.emit({"ok": True, **result})
    else:
        output.result(vision_kernel_bench.table(result))


@app.command("serve")
def serve(
    bf16: Annotated[str, typer.Option(help="Folder of the float model.")] = "",
    int8: Annotated[str, typer.Option(help="Folder of its W8A8 checkpoint (compressed-tensors).")] = "",
    int4: Annotated[str, typer.Option(help="Folder of its int4 checkpoint: served as W4A8 and as W4A16.")] = "",
    heads: Annotated[str, typer.Option(help="Output layers ours also runs with: int8,int4.")] = "",
    zentorch: Annotated[str, typer.Option(help="PYTHON of an environment with vLLM and zentorch, on AMD CPUs.")] = "",
    names: Annotated[str, typer.Option(help="Contestants, separated by commas: as many servers as fit memory.")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="How often every server is timed; medians count.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time vLLM servers of one model: prefill, decode at batch 1, 4 and 16, first token, 32 clients, memory."""
    from pathlib import Path

    from qtoolkit.errors import RequestError
    from qtoolkit.evals import serve_bench

    folders = {"--bf16": bf16, "--int8": int8, "--int4": int4}
    for option, folder in folders.items():
        if folder and not (Path(folder) / "config.json").is_file():
            raise RequestError(f"{option} {folder} is not a model folder.", "Give a folder with a config.json.")
    given = [Path(folder) if folder else None for folder in folders.values()]
    if not any(given):
        raise RequestError("There is nothing to time.", "Give --bf16, --int8 or --int4 with a model folder.")
    if unknown := sorted(set(_words(heads)) - {"int8", "int4"}):
        raise RequestError(f"--heads {unknown[0]} is no output layer.", "Use int8, int4 or both: --heads int8,int4")
    if zentorch and not os.access(zentorch, os.X_OK):
        raise RequestError(f"--zentorch {zentorch} is no Python.", "Give the interpreter of its environment.")
    entries = serve_bench.contestants(given[0], given[1], given[2], tuple(_words(heads)), zentorch)
    if names:
        known = {entry.name: entry for entry in entries}
        if unknown := [word for word in _words(names) if word not in known]:
            raise RequestError(f"--names {unknown[0]} does not take part.", f"Known here: {', '.join(known)}.")
        entries = tuple(known[word] for word in _words(names))
    result = serve_bench.run(entries, rounds, say=output.note)
    if as_json:
        output.emit({"ok": True, **result})
    else:
        output.result(serve_bench.table(result))


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _number(word: str, option: str, example: str) -> int:
    from qtoolkit.errors import RequestError

    if not word.isdecimal() or not int(word):
        raise RequestError(f"{option} {word!r} is not a number above 0.", f"Example: {option} {example}")
    return int(word)


def _shape(word: str) -> tuple[int, int]:
    from qtoolkit.errors import RequestError

    example = "4096x11008"
    parts = word.split("x")
    if len(parts) != 2:
        raise RequestError(f"--shapes {word!r} is not of the form KxN.", f"Example: --shapes {example}")
    k, n = (_number(part, "--shapes", example) for part in parts)
    if k % SIDE or n % SIDE:
        raise RequestError(f"--shapes {word}: both must be multiples of {SIDE}.", f"Example: --shapes {example}")
    return k, n


def _seconds(value: float) -> float:
    from qtoolkit.errors import RequestError

    if not 0 < value < math.inf:
        raise RequestError(f"--seconds {value:g} is no time to measure in.", "Example: --seconds 2")
    return value
