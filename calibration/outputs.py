"""How much an error of one output matters beside another's: the metric of a layer's outputs, head by head.

Two keys of a head that err alike turn the same attention weights, so errors of outputs add up or cancel. Compensation
that minimises |(Q - W) x|^2 counts each output alone; for queries, keys and values much of that norm never reaches the
block's output. With J the Jacobian from a layer's output to the block's, the metric is the mean of J^T J over the
calibration tokens, estimated by Hutchinson's probes: g = J^T s for random signs s has E[g g^T] = J^T J.
Compare YAQA (Tseng et al. 2025), which takes such a factor of the whole model's loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qtoolkit.calibration.smoothing import sequences
from qtoolkit.stages import Block, Stream

TOKENS = 8192  # tokens that are probed
STEPS = 1 << 17  # inputs times channels of a head: rounding takes so many steps one after another at most
DAMPING = 0.01  # added to each head's diagonal, as a part of its mean


def in_heads(block: Block) -> list[str]:
    """Return the targets whose outputs are attention heads': the readers of a group that ends at the value heads."""
    ends = {name for group in block.groups if group.heads for name in group.consumers}
    names = [name for group in block.groups if group.observe in ends for name in group.consumers]
    return [
        name
        for name, layer in block.linears()
        if name in names
        and block.head_dim > 1
        and layer.out_features % block.head_dim == 0
        and layer.in_features * block.head_dim <= STEPS
    ]


def metrics(block: Block, stream: Stream) -> dict[str, Tensor]:
    """Return the metric of every target of ``in_heads``: float32 [heads, head_dim, head_dim], mean diagonal 1, damped.

    Args:
        block: still in float.
        stream: what it receives; the float network's where that is known.
    """
    names = in_heads(block)
    sums: dict[str, Tensor] = {}
    caught: dict[str, Tensor] = {}

    def catch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            caught[name] = out.detach().requires_grad_()
            return caught[name]

        return hook

    floats = Stream(stream.floats or stream.batches, stream.kwargs, device=stream.device)
    draw = torch.Generator("cpu").manual_seed(0)
    handles = [block.layer(name).register_forward_hook(catch(name)) for name in names]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            own = {name: tensor.clone() for name, tensor in block.module.state_dict().items()}
            for hidden, kwargs in sequences(floats, TOKENS) if names else ():
                out = functional_call(block.module, own, (hidden.clone(),), _cloned(kwargs))
                out = out[0] if isinstance(out, tuple) else out
                signs = torch.randint(0, 2, out.shape, generator=draw, device="cpu").to(out) * 2 - 1
                found = torch.autograd.grad((out * signs).sum(), [caught[name] for name in names])
                for name, gradient in zip(names, found, strict=True):
                    heads = gradient.flatten(0, -2).unflatten(-1, (-1, block.head_dim)).transpose(0, 1)
                    part = heads.transpose(1, 2) @ heads  # [heads, head_dim, head_dim]
                    sums[name] = sums[name] + part if name in sums else part
    finally:
        for handle in handles:
            handle.remove()
    return {name: _scaled(total.detach()) for name, total in sums.items()}


def _scaled(total: Tensor) -> Tensor:
    mean = total.diagonal(dim1=1, dim2=2).mean(dim=1)
    unit = torch.eye(total.shape[1], device=total.device)
    live = (mean > 0) & mean.isfinite()  # a head whose output nobody reads: any metric does
    scaled = total / torch.where(live, mean, 1.0).view(-1, 1, 1)
    return torch.where(live.view(-1, 1, 1), scaled, unit) + DAMPING * unit


def _cloned(value: Any) -> Any:
    """Return tensors that autograd may keep: what was made in inference mode must be copied."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: _cloned(part) for name, part in value.items()}
    return tuple(_cloned(part) for part in value) if isinstance(value, tuple) else value
