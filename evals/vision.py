"""`evaluate` for image classifiers: accuracy beside the float network, what it costs, how long each layer takes."""

from __future__ import annotations

import datetime
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from qtoolkit.errors import RequestError
from qtoolkit.evals.results import Machine
from qtoolkit.evals.run import processor, versions
from qtoolkit.vision import data, measure, runtime
from qtoolkit.vision.models import Architecture
from qtoolkit.vision.record import VisionManifest

Say = Callable[[str], None]
BATCHES = (1, 32)
METRICS = {"loss", "drop", "latency_ratio"}  # on which a bound can be set; higher is worse
REPEATS, MOST, ENOUGH = 7, 50, 1.0  # runs at least and at most, seconds after which no more are started


class Accuracy(BaseModel):
    """Part of the test images whose class was found, with its standard error; of the float network where known.

    ``change`` is the difference to the float network and ``change_error`` its standard error: of the paired answers
    where both networks ran (``agreement`` says how often they agree), else None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    images: int
    value: float
    error: float
    before: float | None = None
    change: float | None = None
    change_error: float | None = None
    agreement: float | None = None


class Timing(BaseModel):
    """Median seconds of one forward pass of ``batch`` images, float and packed in turns.

    A spread is the width of the middle half of the runs as a part of the median.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch: int
    float_seconds: float
    packed_seconds: float
    float_spread: float
    packed_spread: float


class Kernel(BaseModel):
    """What runs a packed layer: a kernel's name, or torch and why no kernel does."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    reason: str = ""


class VisionResult(BaseModel):
    """Everything an evaluation of an image classifier found: this is report.json."""

    model_config = ConfigDict(extra="forbid")

    ok: bool = True
    name: str
    manifest: VisionManifest
    accuracy: Accuracy | None = None
    timings: list[Timing] = []
    layer_seconds: dict[str, tuple[float, float]] = {}
    kernels: dict[str, Kernel] = {}
    date: str
    seconds: float
    versions: dict[str, str]
    machine: Machine


def evaluate(
    target: str | Path, *, test: str | None = None, reference: str | None = None, latency: bool = True, say: Say = print
) -> VisionResult:
    """Evaluate a folder that ``qtoolkit compress`` wrote.

    Args:
        target: the folder.
        test: images, see ``qtoolkit.vision.data.load``; without, the accuracy measured at compression is told.
        reference: what it was made from: the model's folder or hub name, or the weight file of one of our networks.
        latency: time the network and each of its layers beside the float ones.
        say: is given every line worth reading.

    Raises:
        RequestError: no such folder or images, or a reference without images to compare on.
        CheckpointError: the folder is damaged.
    """
    began = time.monotonic()
    loaded = runtime.load(target)
    manifest, architecture = loaded.manifest, loaded.architecture
    if reference and not test:
        raise RequestError("A reference needs images to be compared on.", "Add --test DATA.")
    accuracy = _remembered(manifest)
    if test:
        say(f"accuracy on {test}")
        accuracy = _accuracy(loaded, data.load(test, architecture), reference)
    result = VisionResult(
        name=str(target),
        manifest=manifest,
        accuracy=accuracy,
        kernels={name: Kernel(name=runs.name, reason=runs.reason) for name, runs in loaded.kernels.items()},
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        seconds=0.0,
        versions=versions(),
        machine=Machine(processor=processor(), cores=os.cpu_count() or 1, device="cpu"),
    )
    if latency:
        whole = architecture.build().eval()  # random weights: they take as long as any
        for batch in BATCHES:
            say(f"timing {batch} image{'s' if batch > 1 else ''} at a time")
            result.timings.append(in_turns(whole, loaded.network, architecture, batch))
        result.layer_seconds = by_layer(whole, loaded.network, architecture, [row.name for row in manifest.layers])
    result.seconds = time.monotonic() - began
    return result


def metrics(result: VisionResult) -> dict[str, float]:
    """Return every figure that a bound can be set on; higher is worse."""
    found: dict[str, float] = {}
    if result.accuracy:
        found["loss"] = 1 - result.accuracy.value
        if result.accuracy.change is not None:
            found["drop"] = -result.accuracy.change
    if result.timings:
        found["latency_ratio"] = result.timings[0].packed_seconds / result.timings[0].float_seconds
    return found


@torch.inference_mode()
def in_turns(first: nn.Module, second: nn.Module, architecture: Architecture, batch: int) -> Timing:
    """Time two networks in turns, so that what else the machine does hits both."""
    x = torch.zeros(batch, *architecture.input)
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(MOST + 1):
        for network, found in zip((first, second), seconds, strict=True):
            start = time.perf_counter()
            network(x)
            if repeat:  # the first one allocates
                found.append(time.perf_counter() - start)
        if repeat >= REPEATS and sum(map(sum, seconds)) > ENOUGH:
            break
    middle = [statistics.median(found) for found in seconds]
    quarters = [statistics.quantiles(found, n=4) for found in seconds]
    spread = [(q[2] - q[0]) / m for q, m in zip(quarters, middle, strict=True)]
    return Timing(
        batch=batch,
        float_seconds=middle[0],
        packed_seconds=middle[1],
        float_spread=spread[0],
        packed_spread=spread[1],
    )


@torch.inference_mode()
def by_layer(
    first: nn.Module, second: nn.Module, architecture: Architecture, names: list[str]
) -> dict[str, tuple[float, float]]:
    """Return each layer's median seconds in both networks, for one image, in turns."""
    x = torch.zeros(1, *architecture.input)
    runs: list[tuple[dict[str, float], dict[str, float]]] = []
    for repeat in range(REPEATS + 1):
        both = _one(first, names, x), _one(second, names, x)
        if repeat:
            runs.append(both)
    return {
        name: (statistics.median(a[name] for a, _ in runs), statistics.median(b[name] for _, b in runs))
        for name in names
        if name in runs[0][0] and name in runs[0][1]
    }


def _one(network: nn.Module, names: list[str], x: torch.Tensor) -> dict[str, float]:
    started: dict[str, float] = {}
    found: dict[str, float] = {}

    def begin(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            started[name] = time.perf_counter()

        return hook

    def end(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            found[name] = found.get(name, 0.0) + time.perf_counter() - started[name]

        return hook

    handles = []
    for name in names:
        layer = network.get_submodule(name)
        handles += [layer.register_forward_pre_hook(begin(name)), layer.register_forward_hook(end(name))]
    try:
        network(x)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _remembered(manifest: VisionManifest) -> Accuracy | None:
    """Return the accuracy measured at compression, if any."""
    figures = manifest.figures
    if "accuracy_after" not in figures:
        return None
    count, value, before = int(figures["test_images"]), figures["accuracy_after"], figures.get("accuracy_before")
    change = value - before if before is not None else None
    return Accuracy(images=count, value=value, error=_error(value, count), before=before, change=change)


def _accuracy(loaded: runtime.Loaded, images: data.Images, reference: str | None) -> Accuracy:
    architecture = loaded.architecture
    mine = measure.logits(loaded.network, images, architecture).argmax(dim=1)
    right, count = (mine == images.y).double(), len(images)
    value = float(right.mean())
    if reference is None:
        return Accuracy(images=count, value=value, error=_error(value, count))
    theirs = measure.logits(loaded.made_from(reference), images, architecture).argmax(dim=1)
    differences = right - (theirs == images.y).double()
    return Accuracy(
        images=count,
        value=value,
        error=_error(value, count),
        before=float((theirs == images.y).double().mean()),
        change=float(differences.mean()),
        change_error=float(differences.std()) / math.sqrt(count) if count > 1 else None,
        agreement=float((mine == theirs).double().mean()),
    )


def _error(value: float, count: int) -> float:
    """Return the standard error of a part of ``count``: sqrt(p (1 - p) / n)."""
    return math.sqrt(value * (1 - value) / count)
