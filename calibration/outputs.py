"""How much an error of one output matters beside another's: the metric of a layer's outputs in the model's loss.

Two outputs that err alike may turn the next token the same way or cancel. Compensation that minimises |(Q - W) x|^2
counts each output alone. With g the gradient of the loss at a layer's output, the metric is the mean of g g^T over the
probe's tokens: the output's side of the loss's curvature, as the Hessian is the input's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit.calibration import products
from qtoolkit.calibration.backward import backward
from qtoolkit.stages import Block, Probe

LARGEST = 4096  # outputs of a layer that gets a metric: it is as large as the Hessian of so many inputs
DAMPING = 0.01  # added to the diagonal, as a part of its mean, beside what so few tokens leave uncertain


def heads(block: Block, name: str) -> int:
    """Return the channels of a head where the layer's outputs are attention heads', and 0 elsewhere."""
    ends = {reader for group in block.groups if group.heads for reader in group.consumers}
    found = any(group.observe in ends and name in group.consumers for group in block.groups)
    whole = block.head_dim > 1 and block.linear(name).out_features % block.head_dim == 0
    return block.head_dim if found and whole else 0


def metrics(block: Block) -> dict[str, Tensor]:
    """Return the metric of every target of ``block``: what it has, or what its probe says; none without either."""
    return block.metrics or (measured(block, block.probe, inputs=False)[1] if block.probe is not None else {})


def measured(block: Block, probe: Probe, *, inputs: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the gradients at the block's ``inputs`` if asked for, batch by batch, and the metric of every target.

    Gradients are bfloat16 [sequences, tokens, hidden]. A metric is float32 [n, n], damped; its diagonal's mean is 1
    without the damping.
    """
    names = tuple(name for name, layer in block.linears() if 1 < layer.out_features <= LARGEST)
    if not names and not inputs:
        return [], {}
    sums: dict[str, Tensor] = {}
    tokens = dict.fromkeys(names, 0)
    before: list[Tensor] = []
    for found in backward(block, probe, names, inputs=inputs):
        before += [found[0].bfloat16()] if inputs else []
        for name, gradient in zip(names, found[inputs:], strict=True):
            flat = gradient.flatten(0, -2)
            tokens[name] += len(flat)
            if name not in sums:
                sums[name] = flat.new_zeros(flat.shape[1], flat.shape[1])
            products.accumulated(sums[name], flat.T, flat)
            del gradient, flat
        del found  # before there are others
    return before, {name: _scaled(total, DAMPING + len(total) / tokens[name]) for name, total in sums.items()}


def _scaled(total: Tensor, damping: float) -> Tensor:
    """Return ``total`` in its place over its mean diagonal, and damped."""
    mean = float(total.diagonal().mean())
    if not 0 < mean < torch.inf:  # nobody reads these outputs: any metric does
        return torch.eye(len(total), device=total.device)
    total.div_(mean).diagonal().add_(damping)
    return total
