"""Which backend runs a layer on this machine, and why the others do not."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from qtoolkit.kernels import ops as ops

# Preference order. Each names a module with `BACKENDS: tuple[Backend, ...]`; it is imported on first use only.
MODULES = (
    "qtoolkit.kernels.cpu.backend",
    "qtoolkit.kernels.cuda.backend",
    "qtoolkit.kernels.triton.backend",
    "qtoolkit.kernels.selection",
)


@dataclass(frozen=True)
class Problem:
    """One linear layer as a kernel sees it: k inputs, n outputs, scale groups (-1: per channel), activation dtype."""

    k: int
    n: int
    group_size: int
    dtype: torch.dtype
    device: str  # torch device type: "cpu", "cuda"
    chained: bool = False  # the codes are on the chained grid, see ``chained.py``


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
    chained: bool = False  # takes codes on the chained grid, and no others


@dataclass(frozen=True)
class Choice:
    """The chosen backend and, for each one preferred but not taken, the reason."""

    backend: Backend
    refused: dict[str, str]


def _keep(packed: Tensor, scales: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    return packed.contiguous(), scales.float().contiguous()


REFERENCE = Backend("reference", "neutral", lambda problem: None, _keep)
REFERENCE_CHAINED = Backend("reference", "neutral chained", lambda problem: None, _keep, chained=True)
BACKENDS = (REFERENCE, REFERENCE_CHAINED)


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
        if backend.chained != problem.chained:
            if problem.chained:  # the other way round it is no news: chained codes are asked for by name
                refused[backend.name] = "takes plain codes only, not the chained grid"
            continue
        reason = backend.refuse(problem)
        if reason is None:
            return Choice(backend, refused)
        refused[backend.name] = reason
    raise ValueError(f"no backend takes {problem}: " + "; ".join(f"{n}: {r}" for n, r in refused.items()))


def prepare(packed: Tensor, scales: Tensor, problem: Problem) -> Prepared:
    """Bring a checkpoint's weight into the layout of the backend chosen for ``problem``.

    Args:
        packed: int32 [n, ceil(k / 8)], low nibble first, stored with +8.
        scales: float [n, groups]; one column when ``problem.group_size`` is -1.
        problem: the layer and the device it runs on.
    """
    backend = choose(problem).backend
    weight, own_scales = backend.prepare(packed, scales, problem)
    return Prepared(weight, own_scales, backend.layout, backend.name)
