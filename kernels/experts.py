"""A mixture's experts on the W4A8 linear operator: those that have tokens, one after another, as one opaque operator.

What is routed where is known only when it runs, so compilers must not look inside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit.kernels import ops

ops.LIBRARY.define(
    "w4a8_experts(Tensor x, Tensor chosen, Tensor share, Tensor gate_up, Tensor gate_up_scales, Tensor down, "
    "Tensor down_scales, SymInt inner, int group_size, str gate_up_layout, str down_layout) -> Tensor"
)


def _run(
    x: Tensor,
    chosen: Tensor,
    share: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor,
    down: Tensor,
    down_scales: Tensor,
    inner: int,
    group_size: int,
    gate_up_layout: str,
    down_layout: str,
) -> Tensor:
    hidden = x.shape[1]
    ids, order = chosen.flatten().sort(stable=True)
    tokens = order // chosen.shape[1]
    counts = torch.bincount(ids, minlength=len(down)).tolist()
    made = []
    for number, rows in enumerate(x[tokens].split(counts)):
        if len(rows):
            weight, scales = gate_up[number], gate_up_scales[number]
            both = ops.w4a8_linear(rows, weight, scales, None, 2 * inner, group_size, gate_up_layout)
            weight, scales = down[number], down_scales[number]
            made.append(ops.w4a8_gated_linear(both, weight, scales, None, hidden, group_size, down_layout))
    found = torch.zeros_like(x, dtype=torch.float32)
    if made:
        found.index_add_(0, tokens, torch.cat(made).float() * share.flatten()[order].float().unsqueeze(1))
    return found.to(x.dtype)


def _fake(x: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(x)


ops.LIBRARY.impl("w4a8_experts", _run, "CompositeExplicitAutograd")
torch.library.register_fake("qtoolkit::w4a8_experts", _fake, lib=ops.LIBRARY)


def w4a8_experts(
    x: Tensor,
    chosen: Tensor,
    share: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor,
    down: Tensor,
    down_scales: Tensor,
    inner: int,
    group_size: int,
    gate_up_layout: str = "neutral",
    down_layout: str = "neutral",
) -> Tensor:
    """Return the weighted sum of the chosen experts' ``down(silu(gate(x)) * up(x))``, each product W4A8.

    Args:
        x: bfloat16, float16 or float32 [tokens, hidden].
        chosen: integers [tokens, top_k], each token's experts.
        share: [tokens, top_k], what an expert's output counts for a token; summed in float32.
        gate_up: all experts' int4 codes [experts, ...], gate's rows before up's, each in ``gate_up_layout``.
        gate_up_scales: likewise.
        down: likewise, in ``down_layout``.
        down_scales: likewise.
        inner: outputs of gate, and of up.
        group_size: inputs that share a scale; -1 for per-channel.
        gate_up_layout: as in ``ops.w4a8_linear``.
        down_layout: likewise.

    Returns:
        [tokens, hidden] in the dtype of x.
    """
    return torch.ops.qtoolkit.w4a8_experts(
        x,
        chosen,
        share,
        gate_up,
        gate_up_scales,
        down,
        down_scales,
        inner,
        group_size,
        gate_up_layout,
        down_layout,
    )
