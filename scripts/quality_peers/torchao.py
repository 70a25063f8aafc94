"""torchao: int8 dynamic activations and int4 weights, without calibration."""

from __future__ import annotations

from importlib.metadata import version

import torch

from quality_peers.contract import CHANNEL, Job, Meter, Quantized, bits_of, linears, tensors

REQUIRES = ("torch==2.13.0", "torchao==0.18.0", "transformers==5.19.0")


@torch.no_grad()
def quantize(job: Job, meter: Meter) -> Quantized:
    """Apply its W4A8 configuration to every linear layer but the head; its own activations would be asymmetric."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerAxis, PerGroup, quantize_
    from transformers import AutoModelForCausalLM

    with meter:
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
        names = set(linears(model))
        config = Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4,
            weight_granularity=PerAxis(0) if job.group_size == CHANNEL else PerGroup(job.group_size),
        )
        quantize_(model, config, filter_fn=lambda module, name: name in names)
    size = bits_of(model, job.group_size)
    for layer in linears(model).values():
        layer.weight = torch.nn.Parameter(layer.weight.dequantize())
    return Quantized(tensors(model), version("torchao"), size)
