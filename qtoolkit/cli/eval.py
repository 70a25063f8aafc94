"""`qtoolkit eval`: what a checkpoint lost against its float model, as figures, as a report, or as a gate."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qtoolkit.cli import output
from qtoolkit.errors import GateError, RequestError

if TYPE_CHECKING:
    from collections.abc import Callable

    from qtoolkit.evals.results import EvalResult
    from qtoolkit.evals.vision import VisionResult


def command(
    target: Annotated[str, typer.Argument(help="Checkpoint or model folder, hub name, or `tiny`.")],
    reference: Annotated[str, typer.Option(help="Float model to compare with.")] = "",
    ppl: Annotated[list[str] | None, typer.Option(help="Text for perplexity: file, wikitext2, sample, none.")] = None,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, separated by commas.")] = "",
    task_dir: Annotated[str, typer.Option(help="Folder with the tasks' NAME.jsonl or YAML files.")] = "",
    limit: Annotated[int | None, typer.Option(help="Documents per task.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens of a perplexity window.")] = None,
    fail_above: Annotated[list[str] | None, typer.Option(help="metric=value: exit 3 if worse.")] = None,
    out: Annotated[str, typer.Option("-o", "--output", help="Folder for report.html, .md and .json.")] = "",
    endpoint: Annotated[str, typer.Option(help="Address of a server that serves the target.")] = "",
    backend: Annotated[str, typer.Option(help="What runs the tasks: hf or vllm.")] = "hf",
    latency: Annotated[bool, typer.Option("--latency", help="Time a small generation, too.")] = False,
    test: Annotated[str, typer.Option(help="Of an image classifier: test images, as for `compress`.")] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda; the GPU where there is one.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure what was lost: perplexity, divergence and lm-eval tasks; of an image classifier accuracy and cost."""
    if _vision(target):
        if ppl or tasks or task_dir or endpoint or limit is not None or window is not None:
            raise RequestError(f"{target} is an image classifier: it has no text or tasks.", "Give --test DATA.")
        if device or backend != "hf":
            raise RequestError("--backend and --device are for language models.", "Leave them out.")
        _classifier(target, test, reference, out, fail_above or [], as_json)
        return
    if test:
        raise RequestError("--test is for image classifiers.", "Give --ppl TEXT or --tasks.")
    for option, value in (("--limit", limit), ("--task-dir", task_dir or None)):
        if value is not None and not tasks:
            raise RequestError(f"{option} is about tasks, and there are none.", "Add --tasks NAMES.")
    from qtoolkit.evals import gates, report
    from qtoolkit.evals.run import evaluate
    from qtoolkit.evals.texts import label

    texts, names = _texts(ppl), [name for name in tasks.split(",") if name]
    bounds = gates.parse(fail_above or [])
    gates.check_names(bounds, gates.names([label(text) for text in texts], names, bool(reference), bool(endpoint)))
    folder = report.prepare(out) if out else None
    output.quiet_libraries()
    started = time.monotonic()
    result = evaluate(
        target,
        reference=reference or None,
        ppl=texts,
        tasks=names,
        task_dir=task_dir or None,
        limit=limit,
        window=window,
        endpoint=endpoint or None,
        backend=backend,  # type: ignore[arg-type]  # evaluate refuses what it does not know
        latency=latency,
        device=device or None,
        say=lambda text: output.note(f"{time.monotonic() - started:6.1f} s  {text}"),
    )
    _tell(result, folder, lambda: gates.check(result, bounds), as_json)


def _vision(target: str) -> bool:
    from qtoolkit.checkpoint import MANIFEST, read_manifest

    return (Path(target) / MANIFEST).is_file() and read_manifest(target).kind == "vision"


def _classifier(target: str, test: str, reference: str, out: str, fail_above: list[str], as_json: bool) -> None:
    from qtoolkit.evals import gates, report, vision

    bounds = gates.parse(fail_above)
    gates.check_names(bounds, vision.METRICS)
    folder = report.prepare(out) if out else None
    if reference:
        output.quiet_libraries()
    result = vision.evaluate(target, test=test or None, reference=reference or None, say=output.note)
    _tell(result, folder, lambda: gates.compare(vision.metrics(result), bounds), as_json)


def _tell(result: EvalResult | VisionResult, folder: Path | None, gate: Callable[[], None], as_json: bool) -> None:
    """Write the report, print the result, and fail where a figure is worse than its bound."""
    from qtoolkit.evals import report

    written = report.write(result, folder) if folder else []
    try:
        gate()
        failed = None
    except GateError as error:
        failed = error if written else GateError(error.message, "Add -o DIR to see the details.")
    if as_json:
        _emit(result, written, failed)
    else:
        output.result("\n".join(report.lines(result)))
        for path in written:
            output.result(f"{path}")
    if failed and as_json:
        output.note(f"qtoolkit: {failed.message}")
        raise typer.Exit(failed.exit_code)  # the one object is out already
    if failed:
        raise failed


def _emit(result: EvalResult | VisionResult, written: list[Path], failed: GateError | None) -> None:
    data = {**result.model_dump(mode="json"), "report": [str(path) for path in written]}
    if failed:
        data |= {"ok": False, "error": failed.message, "hint": failed.hint, "exit_code": failed.exit_code}
    output.emit(data)


def _texts(asked: list[str] | None) -> list[str]:
    from qtoolkit.evals import texts

    if not asked:
        return [texts.DEFAULT]
    return [] if asked == ["none"] else asked
