"""The linear layers a kernel benchmark compares: ours, torch's own, and vLLM's, each made from random weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Protocol

import torch
from torch import Tensor

from qtoolkit.errors import RequestError
from qtoolkit.evals.kernel_remote import Worker
from qtoolkit.evals.kernel_workers import loop
from qtoolkit.kernels import folded, ops, selection
from qtoolkit.kernels.cpu import bfloat16, bfloat16_compressed

Layer = Callable[[Tensor], Tensor]  # bfloat16 [m, k] -> bfloat16 [m, n]
Timer = Callable[[Tensor], list[float]]  # multiplies bfloat16 [m, k] by the next layers' weights; returns seconds


class Contestant(Protocol):
    """A kind of layer that can be timed, with about ``weight_bits`` a weight value.

    ``integer``: activations are int8, so the int8 peak is its limit.
    """

    @property
    def name(self) -> str:
        """Return what tables call it."""
        ...

    @property
    def weight_bits(self) -> float:
        """Return the bits a weight value takes, scales included."""
        ...

    @property
    def integer(self) -> bool:
        """Tell whether it multiplies int8 activations."""
        ...

    def timer(self, k: int, n: int, copies: int) -> Timer:
        """Make ``copies`` layers; each timed call takes the next, so that weights come from memory."""
        ...


@dataclass(frozen=True)
class Peer:
    """A contestant in this process: ``make(k, n)`` builds a layer from fresh random weights."""

    name: str
    weight_bits: float
    make: Callable[[int, int], Layer]
    integer: bool

    def timer(self, k: int, n: int, copies: int) -> Timer:
        """Return a timer whose timed calls follow some that are not timed."""
        turn = cycle([self.make(k, n) for _ in range(copies)])
        return lambda x: loop.timed(lambda: next(turn)(x))


@dataclass(frozen=True)
class RemotePeer:
    """A contestant in a worker process, which does the same on random tokens of its own."""

    name: str
    weight_bits: float
    integer: bool
    worker: Worker

    def timer(self, k: int, n: int, copies: int) -> Timer:
        """Return a timer that asks the worker."""
        self.worker.ask(make=self.name, k=k, n=n, copies=copies)
        return lambda x: self.worker.ask(run=self.name, m=x.shape[0])["seconds"]


def random_int4(k: int, n: int) -> Tensor:
    """Return random packed int4 weights, int32 [n, k / 8]."""
    return torch.randint(-(2**31), 2**31 - 1, (n, k // 8), dtype=torch.int32)


def ours(group_size: int, folds: bool = False) -> Callable[[int, int], Layer]:
    """Return a maker of our W4A8 layers, run by the backend that serves them here; ``folds``: scales that fold."""

    def make(k: int, n: int) -> Layer:
        groups = 1 if group_size == -1 else k // group_size
        scales = (torch.rand(n, groups) * 0.01).bfloat16()
        if folds:  # products of a bfloat16 base and -15..16 are exact
            scales = scales[:, :1].float() * torch.randint(folded.LEAST, folded.MOST + 1, (n, groups))
        problem = selection.Problem(k, n, group_size, torch.bfloat16, "cpu")
        layer = selection.prepare(random_int4(k, n), scales, problem)
        return lambda x: ops.w4a8_linear(x, layer.weight, layer.scales, None, n, group_size, layer.layout)

    return make


def our_bfloat16(k: int, n: int) -> Layer:
    """Make our product for layers left in bfloat16."""
    weight = bfloat16.prepare(torch.randn(n, k, dtype=torch.bfloat16))
    return lambda x: bfloat16.linear(x, weight, None, n)


def our_compressed_bfloat16(k: int, n: int) -> Layer:
    """Make the same product with 12 bits a weight in memory."""
    weight = bfloat16_compressed.compress(torch.randn(n, k, dtype=torch.bfloat16))
    assert weight is not None  # normal weights fit the tables
    return lambda x: bfloat16_compressed.linear(x, weight, None, n)


def torch_bfloat16(k: int, n: int) -> Layer:
    """Make ``torch.nn.functional.linear`` in bfloat16."""
    weight = torch.randn(n, k, dtype=torch.bfloat16)
    return lambda x: torch.nn.functional.linear(x, weight)


def torch_int4pack(k: int, n: int) -> Layer:
    """Make torch's own int4 weight-only product for CPUs, groups of 128."""
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales_and_zeros = torch.rand(k // 128, n, 2, dtype=torch.bfloat16)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 128, scales_and_zeros)


def local_peers() -> tuple[Peer, ...]:
    """Return the contestants that run in this process, ours first."""
    in_bfloat16 = [
        Peer("qtoolkit-bf16", 16, our_bfloat16, False),
        Peer("qtoolkit-bf16-12bit", 12, our_compressed_bfloat16, False),
    ]
    found = [
        Peer("qtoolkit-g128", 4 + 16 / 128, ours(128), True),
        Peer("qtoolkit-g128-folded", 4 + 8 / 128, ours(128, folds=True), True),
        Peer("qtoolkit-channel", 4, ours(-1), True),
        *([] if bfloat16.refuse(torch.bfloat16, "cpu") else in_bfloat16),
        Peer("torch-bf16", 16, torch_bfloat16, False),
        Peer("torch-int4pack", 4 + 32 / 128, torch_int4pack, False),
    ]
    if importlib.util.find_spec("vllm") is not None:
        from qtoolkit.evals import vllm_kernel_peers

        found += [Peer(*peer) for peer in vllm_kernel_peers.table()]
    return tuple(found)


def peers(names: tuple[str, ...] | None = None, workers: Sequence[Worker] = ()) -> tuple[Contestant, ...]:
    """Return the contestants here and in ``workers``; ``names`` keeps only those.

    Raises:
        RequestError: a name that nobody has.
    """
    found: list[Contestant] = [*local_peers()]
    for worker in workers:
        found += [RemotePeer(name, kind["bits"], kind["integer"], worker) for name, kind in worker.kinds.items()]
    if names is None:
        return tuple(found)
    if unknown := sorted(set(names) - {peer.name for peer in found}):
        known = ", ".join(peer.name for peer in found)
        raise RequestError(f"There is no contestant {', '.join(unknown)} here.", f"Known: {known}.")
    return tuple(peer for peer in found if peer.name in names)
