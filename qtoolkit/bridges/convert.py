"""`qtoolkit.convert`: a quantized checkpoint in another layout, streamed layer by layer, published by one rename."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qtoolkit import __version__, architecture, checkpoint
from qtoolkit.bridges import record
from qtoolkit.bridges.opened import Opened, open_folder
from qtoolkit.bridges.repack import repack
from qtoolkit.bridges.stream import Stream
from qtoolkit.bridges.written import COMPRESSED, LAYOUTS
from qtoolkit.errors import RequestError
from qtoolkit.job import Job, disk_errors
from qtoolkit.packed import PackedLayer, integer_packer
from qtoolkit.registry import suggest


@dataclass(frozen=True)
class Converted:
    """What a conversion did; ``notes`` are sentences for the user."""

    output: str
    layout_before: str
    layout: str
    scheme: str
    layers: int
    scale_error: float
    bytes_before: int
    bytes_after: int
    seconds: float
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the object that ``--json`` prints."""
        return {"ok": True, **asdict(self)}


def convert(
    model: str | Path,
    output: str | Path,
    to: str,
    *,
    fresh: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Converted:
    """Write the quantized checkpoint ``model`` to the folder ``output`` in another layout; codes stay bit for bit.

    Args:
        model: folder or hub name of a checkpoint of ours, or of a symmetric GPTQ, QQQ or compressed-tensors one.
        output: folder to write.
        to: "int4", "int8", "qqq" or "gptq".
        fresh: replace a finished checkpoint in ``output``.
        say: called with a line when a quarter of the layers is done.

    Raises:
        RequestError: the checkpoint cannot be expressed so; the message says which layer and why.
        QToolkitError: see ``qtoolkit.errors``.
    """
    began = time.monotonic()
    if to not in LAYOUTS:
        raise RequestError(f"There is no layout {to!r} to convert to.", suggest(to, LAYOUTS))
    opened = open_folder(model)
    targets = _targets(opened, to)
    digest = opened.source.digest()
    job = Job.open(Path(output), {"qtoolkit": __version__, "converts": digest, "to": to}, fresh=fresh)
    try:
        if not job.published:
            with disk_errors(job.output):
                _write(opened, targets, to, digest, job.staging, say)
            job.publish()
    finally:
        job.close()
    made = checkpoint.read_manifest(job.output)
    return Converted(
        output=str(job.output),
        layout_before=made.converted[-1].layout,
        layout=to,
        scheme=made.scheme.name,
        layers=len(made.layers),
        scale_error=made.converted[-1].scale_error,
        bytes_before=opened.source.bytes,
        bytes_after=made.bytes_after,
        seconds=round(time.monotonic() - began, 2),
        notes=record.notes(made, new=opened.manifest is None),
    )


def _targets(opened: Opened, to: str) -> dict[str, PackedLayer]:
    """Return what each layer becomes: eight-bit layers stay what they are where ``to`` can stand beside them.

    Raises:
        RequestError: the layout cannot hold all layers, or its config cannot say what they are.
    """
    name = opened.source.name
    if not opened.layers:
        raise RequestError(f"{name} has no quantized layer.", "Nothing to convert.")
    if opened.manifest is not None and opened.manifest.packing[0] == to:
        raise RequestError(f"{name} is already {to}.", "Choose another layout.")
    if all(layer.scheme.weight_bits == 8 for layer in opened.layers) and to != "int8":
        raise RequestError(f"{name} has 8-bit weights only, which {to} does not hold.", "Convert it to int8.")
    schemes = {layer.scheme.name for layer in opened.layers}
    if to not in COMPRESSED and len(schemes) > 1:
        mixed = ", ".join(sorted(schemes))
        raise RequestError(f"{name} mixes {mixed}, and {to} files have one scheme.", "Convert it to int4 or int8.")
    if to == "qqq" and opened.experts:
        raise RequestError(f"{name} is a mixture of experts, which no reader of QQQ files runs.", "Convert it to gptq.")
    return {
        layer.name: PackedLayer(layer.name, layer.scheme, "int8" if layer.scheme.weight_bits == 8 else to)
        for layer in opened.layers
    }


def _write(
    opened: Opened, targets: Mapping[str, PackedLayer], to: str, digest: str, folder: Path, say: Callable[[str], None]
) -> None:
    """Write the checkpoint folder; a layer at a time is in memory."""
    source, dtype = opened.source, architecture.stored_dtype(opened.source)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    checkpoint.copy_companions(source.path, folder)
    floats = [name for name in source.files if name not in opened.owners]
    parts = [f"{name}.{part}" for name, layer in targets.items() for part in integer_packer(layer.packer).parts]
    stream = Stream(folder, [*floats, *parts])
    shapes: dict[str, tuple[int, int]] = {}
    worst, wide = 0.0, False
    for name in source.files:
        layer = opened.owners.get(name)
        if layer is None:
            stream.add(name, source.read(name))
        elif layer.name not in shapes:
            weight = opened.read(layer)
            n, k = weight.codes.shape
            packer = integer_packer(targets[layer.name].packer)
            if reason := packer.refuse(n, k, layer.scheme):
                hint = "Choose another layout."
                raise RequestError(f"{layer.name} cannot be stored as {packer.name}: {reason}.", hint)
            tensors, error = repack(layer.name, weight, packer, dtype)
            for part, tensor in tensors.items():
                stream.add(f"{layer.name}.{part}", tensor)
            shapes[layer.name], worst = (n, k), max(worst, error)
            wide |= packer.name in COMPRESSED and tensors["weight_scale"].dtype.itemsize > dtype.itemsize
            if len(shapes) * 4 // len(targets) > (len(shapes) - 1) * 4 // len(targets):
                say(f"{len(shapes)} of {len(targets)} layers")
    files = stream.finish()
    record.write(opened, shapes, to, record.step(opened, digest, worst, wide), files, folder)
