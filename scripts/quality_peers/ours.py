"""This package: the recipe as users run it, calibrated on seven eighths of the tokens that every peer gets."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from qtoolkit.source import Source
from quality_peers.contract import SCALE_BITS, Job, Meter, Quantized, linears, tensors

if TYPE_CHECKING:
    import torch

REQUIRES: tuple[str, ...] = ()  # runs in this package's own environment


def quantize(job: Job, meter: Meter) -> Quantized:
    """Quantize with the recipe ``options["recipe"]``."""
    from qtoolkit import memory

    memory.keep_little()  # as the command does, before PyTorch is imported
    import torch

    import qtoolkit
    from qtoolkit import data, recipe as recipes
    from qtoolkit.lightly import load_transformers, work_alone

    work_alone()  # as the command does, too
    load_transformers()  # here, for nobody's imports are timed
    tokens = job.calibration()
    data.text_tokens = lambda _, wanted, *__: tokens[: wanted.samples]  # instead of text of its own
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
    """Return the bits a weight of the linear layers in the checkpoint; floats count with 16, as everybody's do."""
    stored = weights = 0
    for name, layer in linears(model).items():
        for tensor in (each for each in source.files if each.startswith(f"{name}.weight") and "shape" not in each):
            read = source.read(tensor)
            if read.is_floating_point():  # scales, or a layer that stays in float
                stored += SCALE_BITS * read.numel()
            else:  # int32 words, the last of a row perhaps not full: 8 or 4 codes each
                stored += round(32 * read.shape[1] / layer.in_features) * layer.weight.numel()
        weights += layer.weight.numel()
    return stored / weights
