"""Round to nearest: what int4 costs when nothing is done about it."""

from __future__ import annotations

import torch

from quality_peers.contract import CHANNEL, Job, Meter, Quantized, bits_of, linears, tensors

REQUIRES: tuple[str, ...] = ()  # runs in this package's own environment


@torch.no_grad()
def quantize(job: Job, meter: Meter) -> Quantized:
    """Round every linear layer."""
    from transformers import AutoModelForCausalLM

    with meter:
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
        for layer in linears(model).values():
            layer.weight.copy_(round_weight(layer.weight, job.group_size))
    return Quantized(tensors(model), torch.__version__, bits_of(model, job.group_size))


def round_weight(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return ``weight`` [n, k] rounded to codes -8..7 with one scale, absmax / 7.5, per group of a row."""
    groups = weight.reshape(len(weight), -1, weight.shape[1] if group_size == CHANNEL else group_size)
    scales = (groups.abs().amax(-1, keepdim=True) / 7.5).clamp(min=torch.finfo(torch.float32).tiny)
    return ((groups / scales).round().clamp(-8, 7) * scales).view_as(weight)
