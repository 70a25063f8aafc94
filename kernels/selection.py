"""Which backend runs a layer on this machine, and why the others do not."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from importlib import import_module

import torch
from torch import Tensor

from qtoolkit.kernels import folded, ops as ops

# Preference order. Each names a module with `BACKENDS: tuple[Backend, ...]`; it is imported on first use only.
MODULES = (
    "qtoolkit.kernels.cpu.backend",
    "qtoolkit.kernels.cuda.backend",
    "qtoolkit.kernels.triton.backend",
    "qtoolkit.kernels.selection",
)


class Grid(StrEnum):
    """What codes and scales mean; a backend takes one of these."""

    PLAIN = "plain"
    CHAINED = "chained"  # see ``chained.py``: asked for by name
    FOLDED = "folded"  # see ``folded.py``: found in the scales


@dataclass(frozen=True)
class Problem:
    """One linear layer as a kernel sees it: k inputs, n outputs, scale groups (-1: per channel), activation dtype."""

    k: int
    n: int
    group_size: int
    dtype: torch.dtype
    device: str  # torch device type: "cpu", "cuda"
    grid: Grid = Grid.PLAIN


@dataclass(frozen=True)
class Prepared:
    """A layer's weight in a backend's own layout, ready for ``ops.w4a8_linear``."""

    weight: Tensor
    scales: Tensor
    layout: str
    backend: str


@dataclass(frozen=True)
class Backend:
    """One way to run the product: ``refuse`` gives the reason in words or None, ``prepare`` permutes at load."""

    name: str
    layout: str
    refuse: Callable[[Problem], str | None]
    prepare: Callable[[Tensor, Tensor, Problem], tuple[Tensor, Tensor]]  # packed int32 [n, k/8], scales [n, groups]
    grid: Grid = Grid.PLAIN  # the one it takes


@dataclass(frozen=True)
class Choice:
    """The chosen backend and, for each one preferred but not taken, the reason."""

    backend: Backend
    refused: dict[str, str]


def _keep(packed: Tensor, scales: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    return packed.contiguous(), scales.float().contiguous()


REFERENCE = Backend("reference", "neutral", lambda problem: None, _keep)
REFERENCE_CHAINED = Backend("reference", "neutral chained", lambda problem: None, _keep, Grid.CHAINED)
REFERENCE_FOLDED = Backend("reference", "neutral folded", lambda problem: None, _keep, Grid.FOLDED)
BACKENDS = (REFERENCE, REFERENCE_CHAINED, REFERENCE_FOLDED)


def backends() -> tuple[Backend, ...]:
    """Return every known backend, the preferred one first; QTOOLKIT_BACKEND=name keeps only that one."""
    found = tuple(b for module in MODULES for b in import_module(module).BACKENDS)
    wanted = os.environ.get("QTOOLKIT_BACKEND")
    if not wanted:
        return found
    kept = tuple(b for b in found if b.name == wanted)
    if not kept:
        raise ValueError(f"QTOOLKIT_BACKEND={wanted} names no backend; known: {', '.join(b.name for b in found)}")
    return kept


def choose(problem: Problem, candidates: Iterable[Backend] | None = None) -> Choice:
    """Return the first backend that does not refuse ``problem``, with the reasons of those that did.

    Raises:
        ValueError: every candidate refused; the message lists the reasons.
    """
    refused: dict[str, str] = {}
    for backend in candidates if candidates is not None else backends():
        if backend.grid is not problem.grid:
            if problem.grid is Grid.CHAINED:  # of the others it is no news
                refused[backend.name] = "takes plain codes only, not the chained grid"
            continue
        reason = backend.refuse(problem)
        if reason is None:
            return Choice(backend, refused)
        refused[backend.name] = reason
    raise ValueError(f"no backend takes {problem}: " + "; ".join(f"{n}: {r}" for n, r in refused.items()))


def prepare(packed: Tensor, scales: Tensor, problem: Problem, fold: bool = True) -> Prepared:
    """Bring a checkpoint's weight into the layout of the backend chosen for ``problem``, folded where its scales do.

    Args:
        packed: int32 [n, ceil(k / 8)], low nibble first, stored with +8.
        scales: float [n, groups]; one column when ``problem.group_size`` is -1.
        problem: the layer and the device it runs on.
        fold: False keeps groups that would fold as they are, so that many layers have one layout.
    """
    backend = choose(problem).backend
    if fold and problem.grid is Grid.PLAIN and problem.group_size != -1:
        backend = _folding(backend, problem, scales) or backend
    weight, own_scales = backend.prepare(packed, scales, replace(problem, grid=backend.grid))
    return Prepared(weight, own_scales, backend.layout, backend.name)


def _folding(backend: Backend, problem: Problem, scales: Tensor) -> Backend | None:
    """Return the form of ``backend`` that runs folded groups, if it has one and the scales fold."""
    folding = replace(problem, grid=Grid.FOLDED)
    for other in backends():
        if other.name == backend.name and other.grid is Grid.FOLDED and other.refuse(folding) is None:
            return other if folded.split(scales) is not None else None
    return None
