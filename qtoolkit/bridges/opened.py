"""A quantized model folder of whatever layout, opened: its layers, and its integers one layer at a time."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qtoolkit import architecture, checkpoint
from qtoolkit.bridges import compressed, gptq, qqq
from qtoolkit.bridges.described import Described
from qtoolkit.errors import CheckpointError, QToolkitError, RequestError, said
from qtoolkit.packed import PackedLayer, integer_packer
from qtoolkit.registry import suggest
from qtoolkit.scheme import Scheme
from qtoolkit.source import Source, read_json, resolve
from qtoolkit.stages import QuantizedWeight

METHODS = {"gptq": gptq.read, "qqq": qqq.read, "compressed-tensors": compressed.read}
METHOD_OF = {"config_groups": "compressed-tensors", "wbits": "qqq", "bits": "gptq"}  # of configs that name none
SIDE_FILES = ("quantize_config.json", "quant_config.json")  # where files older than config.json's entry say it
HEAD = "lm_head"


@dataclass(frozen=True)
class Opened:
    """A quantized model on this disk; ``manifest`` if qtoolkit made it."""

    source: Source
    described: Described
    manifest: checkpoint.Manifest | None

    @property
    def layers(self) -> tuple[PackedLayer, ...]:
        """Return the quantized layers."""
        return self.described.layers

    @property
    def scheme(self) -> Scheme:
        """Return the scheme of the whole: the manifest's, or that of most layers."""
        if self.manifest is not None:
            return self.manifest.scheme
        return Counter(layer.scheme for layer in self.layers).most_common(1)[0][0]

    @cached_property
    def owners(self) -> dict[str, PackedLayer]:
        """Return, for every stored tensor that holds codes or scales, its layer."""
        names = {f"{layer.name}.{part}": layer for layer in self.layers for part in integer_packer(layer.packer).parts}
        return {name: layer for name, layer in names.items() if name in self.source.files}

    @cached_property
    def floats(self) -> list[str]:
        """Return the linear layers that stay in float, the output layer first."""
        known = self._architecture
        embedding = known.stored(known.residual.embedding) if known else ""
        kept = [HEAD] if HEAD not in {layer.name for layer in self.layers} else []
        for name, shape in self.source.shapes().items():
            layer, _, part = name.rpartition(".")
            if part == "weight" and len(shape) == 2 and name not in self.owners and layer not in (HEAD, embedding):
                kept.append(layer)
        return kept

    @property
    def experts(self) -> str:
        """Return what stands in the name of every expert's layer, or nothing."""
        known = self._architecture
        marker = known.stored(f".{known.experts.module}.") if known and known.experts else ""
        return marker if marker and any(marker in layer.name for layer in self.layers) else ""

    def read(self, layer: PackedLayer) -> QuantizedWeight:
        """Return a layer's codes and scales; see ``PackedLayer.unpack`` for errors."""
        return layer.unpack(self.described.neutral(layer.tensors(self.source)))

    @property
    def _architecture(self) -> architecture.Architecture | None:
        return architecture.table().get(str(self.source.config.get("model_type", "")))


def open_folder(model: str | Path) -> Opened:
    """Open a checkpoint of ours, or a GPTQ, QQQ or compressed-tensors one of another tool.

    Raises:
        RequestError: it is not there, is no quantized language model, or is quantized in a way that cannot be read.
        CheckpointError: it is damaged or incomplete.
        ModelError: its files cannot be read.
    """
    source = resolve(model)
    if (source.path / checkpoint.MANIFEST).is_file():
        manifest = checkpoint.verify(source.path)
        if manifest.kind != "llm":
            raise RequestError(f"{source.name} is an image classifier, which has one layout.", "Nothing to convert.")
        layers = tuple(manifest.packed(layer) for layer in manifest.layers)
        return Opened(source, Described(manifest.packing[0], layers, declared=True), manifest)
    config = _quantization_config(source)
    method = str(config.get("quant_method") or next((METHOD_OF[key] for key in METHOD_OF if key in config), ""))
    if method not in METHODS:
        raise RequestError(f"{source.name} is quantized by {method!r}, which is not read.", suggest(method, METHODS))
    try:
        return Opened(source, METHODS[method](config, source.shapes()), None)
    except QToolkitError as error:
        raise type(error)(f"{source.name} cannot be converted: {error.message}", error.hint) from None
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise CheckpointError(f"{source.name} has an odd quantization_config: {said(error)}.") from None


def _quantization_config(source: Source) -> dict[str, Any]:
    for key in ("quantization_config", "compression_config"):
        found = source.config.get(key)
        if isinstance(found, dict) and found:
            return found
    for name in SIDE_FILES:
        if (source.path / name).is_file():
            return read_json(source.path / name)
    raise RequestError(f"{source.name} is not quantized.", "`qtoolkit quantize` takes a float model.")
