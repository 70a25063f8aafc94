"""The linear layers a kernel benchmark compares: ours, torch's own, and vLLM's, each made from random weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qtoolkit.kernels import ops, selection

Layer = Callable[[Tensor], Tensor]  # bfloat16 [m, k] -> bfloat16 [m, n]


@dataclass(frozen=True)
class Peer:
    """One contestant: ``make(k, n)`` builds a layer from fresh random weights of about ``weight_bits`` a value."""

    name: str
    weight_bits: float
    make: Callable[[int, int], Layer]
    integer: bool  # multiplies int8 activations, so the int8 peak is its limit


def random_int4(k: int, n: int) -> Tensor:
    """Return random packed int4 weights, int32 [n, k / 8]."""
    return torch.randint(-(2**31), 2**31 - 1, (n, k // 8), dtype=torch.int32)


def ours(group_size: int) -> Callable[[int, int], Layer]:
    """Return a maker of our W4A8 layers, run by the backend that serves them here."""

    def make(k: int, n: int) -> Layer:
        groups = 1 if group_size == -1 else k // group_size
        scales = (torch.rand(n, groups) * 0.01).bfloat16()
        problem = selection.Problem(k, n, group_size, torch.bfloat16, "cpu")
        layer = selection.prepare(random_int4(k, n), scales, problem)
        return lambda x: ops.w4a8_linear(x, layer.weight, layer.scales, None, n, group_size, layer.layout)

    return make


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


def peers(names: tuple[str, ...] | None = None) -> tuple[Peer, ...]:
    """Return the contestants that can run on this machine, ours first; ``names`` keeps only those."""
    found = [
        Peer("qtoolkit-g128", 4 + 16 / 128, ours(128), True),
        Peer("qtoolkit-channel", 4, ours(-1), True),
        Peer("torch-bf16", 16, torch_bfloat16, False),
        Peer("torch-int4pack", 4 + 32 / 128, torch_int4pack, False),
    ]
    if importlib.util.find_spec("vllm") is not None:
        from qtoolkit.evals import vllm_kernel_peers

        found += [Peer(*peer) for peer in vllm_kernel_peers.table()]
    if names is None:
        return tuple(found)
    if unknown := sorted(set(names) - {peer.name for peer in found}):
        raise ValueError(f"no such peer here: {', '.join(unknown)}; known: {', '.join(peer.name for peer in found)}")
    return tuple(peer for peer in found if peer.name in names)
