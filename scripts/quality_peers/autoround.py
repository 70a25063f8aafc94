"""AutoRound: rounding and clipping learned by signed gradient descent, with int8 per-token activations declared."""

from __future__ import annotations

from importlib.metadata import version

import torch

from quality_peers.contract import Job, Meter, Quantized, bits_of, tensors

REQUIRES = ("torch==2.13.0", "auto-round==0.16.0")
BATCH = 8


def quantize(job: Job, meter: Meter) -> Quantized:
    """Tune every block with the default number of steps, or ``options["iters"]``."""
    from auto_round import AutoRound
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = job.calibration()
    batches = DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids], batch_size=BATCH)
    scheme = {
        "bits": 4, "group_size": job.group_size, "sym": True, "data_type": "int",
        "act_bits": 8, "act_group_size": -1, "act_sym": True, "act_data_type": "int", "act_dynamic": True,
    }  # fmt: skip
    with meter:
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
        size = bits_of(model, job.group_size)
        rounder = AutoRound(
            model=model,
            tokenizer=AutoTokenizer.from_pretrained(job.model),
            scheme=scheme,
            dataset=batches,
            nsamples=ids.shape[0],
            seqlen=ids.shape[1],
            batch_size=BATCH,
            iters=job.options.get("iters", 200),
            seed=42 + job.seed,
            device_map="cpu",
            amp=False,
            enable_torch_compile=False,  # compiling takes longer than these steps on a CPU
        )
        model, _ = rounder.quantize()
    found = {name.replace(".orig_layer.", "."): tensor for name, tensor in tensors(model).items()}
    return Quantized(found, version("auto-round"), size)
