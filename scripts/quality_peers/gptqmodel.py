"""GPTQModel: weight-only GPTQ; its int4 weights are measured under int8 activations like everybody's."""

from __future__ import annotations

import os
from importlib.metadata import version
from tempfile import TemporaryDirectory

import torch

from quality_peers.contract import Job, Meter, Quantized, bits_of, linears, tensors

REQUIRES = ("gptqmodel==7.7.0",)  # needs torch 2.14.1 or newer


def quantize(job: Job, meter: Meter) -> Quantized:
    """Quantize with its defaults, and read the weights back from its dequantizer."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its default on two cores, one, is refused by itself
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from transformers import AutoModelForCausalLM

    ids = job.calibration()
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    with TemporaryDirectory() as folder:
        with meter:
            config = QuantizeConfig(bits=4, group_size=job.group_size, sym=True, device="cpu")
            model = GPTQModel.load(job.model, config, dtype=torch.float32)
            model.quantize(rows, batch_size=1)
        model.save(folder)
        packed = GPTQModel.load(folder, backend=BACKEND.TORCH, device="cpu").model
        dense = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
        with torch.no_grad():
            for name, layer in linears(dense).items():
                layer.weight.copy_(packed.get_submodule(name).dequantize_weight().T)  # [k, n] -> [n, k]
    return Quantized(tensors(dense), version("gptqmodel"), bits_of(dense, job.group_size))
