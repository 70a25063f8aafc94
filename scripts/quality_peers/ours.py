"""This package: the recipe as users run it, calibrated on the tokens that every peer gets."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from qtoolkit.source import Source
from quality_peers.contract import Job, Meter, Quantized, linears, tensors

REQUIRES: tuple[str, ...] = ()  # runs in this package's own environment


def quantize(job: Job, meter: Meter) -> Quantized:
    """Quantize with the recipe ``options["recipe"]``."""
    import transformers.models.auto.modeling_auto  # noqa: F401  # imported here, for nobody's imports are timed

    import qtoolkit
    from qtoolkit import data, recipe as recipes

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
        model = qtoolkit.load(out, dtype=torch.float32, activations=False)
        return Quantized(tensors(model), qtoolkit.__version__, stored_bits(Source(out, "quantized"), model))


def stored_bits(source: Source, model: torch.nn.Module) -> float:
    """Return the bits a weight of the linear layers as the checkpoint stores them: codes, scales, what stays float."""
    stored = weights = 0
    for name, layer in linears(model).items():
        parts = [tensor for tensor in source.files if tensor.startswith(f"{name}.weight") and "shape" not in tensor]
        stored += sum(8 * source.read(tensor).nbytes for tensor in parts)
        weights += layer.weight.numel()
    return stored / weights
