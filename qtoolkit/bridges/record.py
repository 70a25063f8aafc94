"""What a converted checkpoint says of itself: config.json in its layout's words, qtoolkit.json with its history."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtoolkit import __version__, architecture, checkpoint
from qtoolkit.bridges import written
from qtoolkit.bridges.opened import HEAD, Opened

REPLACED = ("quantization_config", "compression_config")  # of config.json
UNDECLARED = "its files said nothing of int8 inputs, which qtoolkit gives it: nothing was calibrated for them"
WIDE = "some scales stay in float32; engines that keep scales in the model's dtype round them when they load"
SERVED = {
    "gptq": "GPTQ files have no word for int8 inputs: QTOOLKIT_W4A8=always serves them as W4A8",
    "qqq": "vLLM reads QQQ files where qtoolkit's plugin is installed",
}
Matrices = Mapping[str, tuple[int, int]]  # [n, k] of every layer


def step(opened: Opened, digest: str, scale_error: float, wide: bool) -> checkpoint.Conversion:
    """Return the line that a conversion adds to a checkpoint's history."""
    layout = opened.described.layout
    return checkpoint.Conversion(
        source=opened.source.name, digest=digest, layout=layout, scale_error=scale_error, wide_scales=wide
    )


def write(
    opened: Opened, shapes: Matrices, to: str, done: checkpoint.Conversion, files: dict[str, int], folder: Path
) -> None:
    """Write config.json and qtoolkit.json of a checkpoint in the layout ``to``.

    Args:
        opened: what was converted.
        shapes: of its layers.
        to: name of the layout.
        done: the conversion.
        files: bytes of every weight file written.
        folder: the new checkpoint's.
    """
    config = {key: value for key, value in opened.source.config.items() if key not in REPLACED}
    if "torch_dtype" in config:
        config["dtype"] = config.pop("torch_dtype")
    config["quantization_config"] = quantization_config(opened, to)
    checkpoint.write_json(folder / "config.json", config)
    before = opened.manifest or foreign(opened, shapes, done.digest)
    beside = {"int8"} if any(layer.scheme.weight_bits == 8 for layer in opened.layers) else set()
    changes = {
        "packing": (to, *(beside - {to})),
        "converted": (*before.converted, done),
        "bytes_after": sum(files.values()),
        "files": files,
    }
    manifest = before.model_copy(update=changes)
    checkpoint.write_json(folder / checkpoint.MANIFEST, manifest.model_dump(mode="json"))


def quantization_config(opened: Opened, to: str) -> dict[str, Any]:
    """Return the entry for config.json in the words of the layout ``to``."""
    others = {layer.name: layer.scheme for layer in opened.layers if layer.scheme != opened.scheme}
    return written.quantization_config(to, opened.scheme, opened.floats, others, opened.experts)


def foreign(opened: Opened, shapes: Matrices, digest: str) -> checkpoint.Manifest:
    """Return what is known of a checkpoint that another tool made; how it calibrated is not."""
    source, size = opened.source, architecture.stored_dtype(opened.source).itemsize
    floats = [shape for name, shape in source.shapes().items() if name not in opened.owners]
    reason = f"it is in float in {source.name}"
    return checkpoint.Manifest(
        source=source.name,
        revision=source.revision,
        source_digest=digest,
        recipe={},
        digest="",
        scheme=opened.scheme,
        seed=0,
        calibration_tokens=0,
        versions={"qtoolkit": __version__},
        layers=tuple(
            checkpoint.LayerRecord(name=layer.name, scheme=layer.scheme.name, shape=shapes[layer.name])
            for layer in opened.layers
        ),
        unquantized=tuple(checkpoint.Unquantized(name=name, reason=reason) for name in opened.floats if name != HEAD),
        notes=() if opened.described.declared else (UNDECLARED,),
        bytes_before=size * sum(math.prod(shape) for shape in [*shapes.values(), *floats]),
        bytes_after=0,
        files={},
    )


def notes(made: checkpoint.Manifest, new: bool) -> tuple[str, ...]:
    """Return what a user should know of a conversion just made; ``new``: the manifest, too, was made by it."""
    last, to = made.converted[-1], made.packing[0]
    error = last.scale_error
    scales = f"scales were rounded, by at most {error:.2g} of their value" if error else "so are the scales"
    found = [f"the codes are the same, bit for bit; {scales}", *([SERVED[to]] if to in SERVED else [])]
    return (*found, *([WIDE] if last.wide_scales else []), *(made.notes if new else ()))
