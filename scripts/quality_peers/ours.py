"""This package: the recipe as users run it, calibrated on the tokens that every peer gets."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from quality_peers.contract import Job, Meter, Quantized, tensors

REQUIRES: tuple[str, ...] = ()  # runs in this package's own environment


def quantize(job: Job, meter: Meter) -> Quantized:
    """Quantize with the recipe ``options["recipe"]``."""
    import qtoolkit
    from qtoolkit import data, recipe as recipes
    from qtoolkit.checkpoint import read_manifest
    from qtoolkit.source import Source

    tokens = job.calibration()
    data.calibration_tokens = lambda *_: tokens  # instead of text of its own
    changes = {
        "scheme.group_size": job.group_size,
        "calibration.samples": tokens.shape[0],
        "calibration.length": tokens.shape[1],
        "calibration.seed": job.seed,
    }
    with TemporaryDirectory() as folder:
        out = Path(folder) / "quantized"
        with meter:
            qtoolkit.quantize(job.model, recipes.load(job.options["recipe"], changes), out)
        names = {layer.name: layer.shape for layer in read_manifest(out).layers}
        model = qtoolkit.load(out, dtype=torch.float32, activations=False)
        source = Source(out, "quantized")
        stored = sum(
            8 * source.read(f"{name}.{part}").nbytes for name in names for part in ("weight_packed", "weight_scale")
        )
        kept = sum(  # what a recipe left in float counts with its 16 bits
            16 * module.weight.numel()
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name != "lm_head" and name not in names
        )
        weights = sum(
            module.weight.numel()
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name != "lm_head"
        )
        return Quantized(tensors(model), qtoolkit.__version__, (stored + kept) / weights)
