"""llm-compressor: SmoothQuant or offline rotations, then GPTQ, in one `oneshot` call, saved as it saves."""

from __future__ import annotations

from importlib.metadata import version
from tempfile import TemporaryDirectory
from typing import Any

import torch

from quality_peers.contract import CHANNEL, Job, Meter, Quantized, bits_of, tensors

REQUIRES = ("torch==2.13.0", "llmcompressor==0.14.0")
ALPHA = 0.8  # of its own W8A8 and W4A8 examples


def quantize(job: Job, meter: Meter) -> Quantized:
    """Run ``oneshot`` with the W4A8 scheme."""
    from compressed_tensors import ModelCompressor
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = job.calibration()
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    with TemporaryDirectory() as folder, meter:
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
        size = bits_of(model, job.group_size)
        oneshot(
            model=model,
            tokenizer=AutoTokenizer.from_pretrained(job.model),
            dataset=rows,
            recipe=recipe(job),
            num_calibration_samples=ids.shape[0],
            max_seq_length=ids.shape[1],
            shuffle_calibration_samples=False,
            output_dir=folder,
        )
    ModelCompressor.from_pretrained_model(model).decompress_model(model)  # saving has packed it
    return Quantized(tensors(model), version("llmcompressor"), size)


def recipe(job: Job) -> list[Any]:
    """Return the modifiers: the transform that the variant asks for, then GPTQ."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.transform import SpinQuantModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    grouping = {"strategy": "channel"} if job.group_size == CHANNEL else {
        "strategy": "group", "group_size": job.group_size,
    }  # fmt: skip
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(num_bits=4, type="int", symmetric=True, **grouping),
        input_activations=QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True),
    )
    rotate = job.options.get("transform") == "rotate"
    first = (
        SpinQuantModifier(rotations=["R1", "R2"], transform_type="random-hadamard")
        if rotate
        else SmoothQuantModifier(smoothing_strength=ALPHA)
    )
    return [first, GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])]
