"""The packed checkpoint: a Hugging Face folder in the standard compressed-tensors layout, plus qtoolkit.json."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from qtoolkit import registry
from qtoolkit.errors import CheckpointError, ModelError, RequestError
from qtoolkit.packed import PackedLayer, integer_packer
from qtoolkit.scheme import Scheme
from qtoolkit.source import Source

MANIFEST = "qtoolkit.json"
SCHEMA_VERSION = 1
COPIED = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "LICENSE*")  # what goes with the weights, from the source
OWN = ("config.json", MANIFEST, "model.safetensors.index.json", "quantize_config.json", "quant_config.json")


class LayerRecord(BaseModel):
    """One quantized layer: full name, scheme, shape [n, k] and the figures its transforms reported."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    scheme: str
    shape: tuple[int, int]
    error: float | None = Field(
        None,
        description="|(A - Q) x|^2 / |A x|^2 on the calibration inputs; A is the weight aimed at; None: another tool "
        "quantized it, so it is not known",
    )
    figures: dict[str, float] = {}

    @property
    def parsed_scheme(self) -> Scheme:
        """Return what the scheme's name says."""
        return Scheme.named(self.scheme)


class GroupRecord(BaseModel):
    """One channel group's figures, such as the smoothing threshold and its losses."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    step: str
    figures: dict[str, float]


class Unquantized(BaseModel):
    """A layer that stayed in float, and why."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    reason: str


class Choice(BaseModel):
    """How outliers are treated and why: each way's divergence on held-out text, some blocks quantized one by one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    chosen: str
    divergence: dict[str, float] = Field(
        description="KL in nats a token, weights rounded to nearest, summed over the blocks tried"
    )
    compensated: dict[str, float] = Field({}, description="the same of ways that this left open, by the recipe's steps")
    blocks: tuple[str, ...]
    held_out_tokens: int

    @property
    def decisive(self) -> dict[str, float]:
        """Return the figures that decided: never a mixture, because compensated ways diverge less than rounded ones."""
        return self.compensated or self.divergence


class BudgetRow(BaseModel):
    """Layers that share an input: what they became, and the divergence in nats that each kind was measured to cause."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: tuple[str, ...]
    kind: str = Field(description="name of a scheme, or float")
    loss: dict[str, float]


class BudgetRecord(BaseModel):
    """What a size budget was spent on; bits a weight count codes and scales of the quantizable layers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: float
    used: float
    rows: tuple[BudgetRow, ...]


class Conversion(BaseModel):
    """A change of layout: from which folder and layout, and what became of the scales."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    digest: str
    layout: str
    scale_error: float = Field(description="largest relative error of a scale that some code is multiplied with")
    wide_scales: bool = Field(False, description="some scales are stored wider than the model's dtype")


class Manifest(BaseModel):
    """What qtoolkit.json says: where the checkpoint comes from and what was done. Unknown keys are an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    kind: Literal["llm", "vision"] = "llm"
    source: str
    revision: str | None = None
    source_digest: str
    recipe: dict[str, Any]
    digest: str
    scheme: Scheme
    seed: int
    calibration_tokens: int
    versions: dict[str, str]
    packing: tuple[str, ...] = ("int4",)
    layers: tuple[LayerRecord, ...]
    groups: tuple[GroupRecord, ...] = ()
    unquantized: tuple[Unquantized, ...] = ()
    choice: Choice | None = None
    budget: BudgetRecord | None = None
    converted: tuple[Conversion, ...] = Field((), description="changes of layout since, the latest last")
    notes: tuple[str, ...] = Field((), description="what was changed in the model beyond its weights")
    bytes_before: int
    bytes_after: int
    files: dict[str, int] = Field(description="bytes of every weight file")

    @field_validator("recipe")
    @classmethod
    def _check_recipe(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(value.get("steps", {}), dict):
            raise ValueError("its steps are no mapping of names to options")
        return value

    @field_validator("packing")
    @classmethod
    def _check_packing(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("there is none")
        for name in value:
            if name not in registry.packers.targets():
                raise ValueError(f"{name!r} is not known here")
        return value

    def packed(self, layer: LayerRecord) -> PackedLayer:
        """Return one of the layers with its packer: the first named, or int8 for what has eight bits beside it.

        Raises:
            CheckpointError: its scheme is none.
        """
        try:
            scheme = layer.parsed_scheme
        except ValueError as error:
            raise CheckpointError(f"{MANIFEST} is damaged: {layer.name}: {error}.", "Quantize again.") from None
        return PackedLayer(layer.name, scheme, "int8" if scheme.weight_bits == 8 else next(iter(self.packing), "int4"))

    @property
    def errors(self) -> dict[str, float]:
        """Return the error of every layer whose error is known."""
        return {layer.name: layer.error for layer in self.layers if layer.error is not None}


def read_manifest(path: str | Path) -> Manifest:
    """Read ``qtoolkit.json`` of the checkpoint folder ``path``.

    Raises:
        RequestError: the folder is not there.
        CheckpointError: no manifest, a damaged one, or one of a newer schema.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise RequestError(f"There is no checkpoint folder {folder}.", "`qtoolkit quantize MODEL -o DIR` makes one.")
    file = folder / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{folder} has no {MANIFEST}.", "It is not a finished qtoolkit checkpoint.")
    try:
        data = json.loads(file.read_text("utf-8"))
        version = int(data["schema_version"])
    except (ValueError, KeyError, TypeError, OverflowError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: {' '.join(str(error).split())}.", "Quantize again.") from None
    if version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{file} has schema version {version}, but this qtoolkit knows up to {SCHEMA_VERSION}.", "Update qtoolkit."
        )
    try:
        return _kind(data).model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        said = first["msg"].removeprefix("Value error, ")
        raise CheckpointError(f"{file} is damaged at {place}: {said}.", "Quantize again.") from None


def _kind(data: dict[str, Any]) -> type[Manifest]:
    """Return the manifest class of a checkpoint's kind."""
    if data.get("kind") != "vision":
        return Manifest
    from qtoolkit.vision.record import VisionManifest

    return VisionManifest


def verify(path: str | Path) -> Manifest:
    """Check, before anything runs, that every file has its size and every packed layer its tensors and shapes.

    Raises:
        CheckpointError: something is missing, truncated or does not fit; the file or tensor is named.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    for name, size in manifest.files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise CheckpointError(f"{folder / name} {state}.", "Copy the checkpoint again, or quantize again.")
    source = Source(folder, str(folder))
    _verify_config(source, manifest)
    if manifest.kind == "vision":
        return manifest  # each packer checks its own tensors when they are unpacked
    shapes = source.shapes()
    for record in manifest.layers:
        layer = manifest.packed(record)
        for tensor, shape in integer_packer(layer.packer).shapes(*record.shape, layer.scheme).items():
            name = f"{layer.name}.{tensor}"
            if shapes.get(name) != shape:
                state = f"shape {list(shapes[name])}" if name in shapes else "nothing"
                raise CheckpointError(f"{folder}: {name} should have shape {list(shape)}, found {state}.")
    return manifest


def _verify_config(source: Source, manifest: Manifest) -> None:
    file, hint = source.path / "config.json", "Copy the checkpoint again, or quantize again."
    if not file.is_file():
        raise CheckpointError(f"{file} is missing.", hint)
    try:
        config = source.config
    except ModelError as error:
        raise CheckpointError(error.message, hint) from None
    wanted: dict[str, type] = {"model_type": str} | ({"quantization_config": dict} if manifest.kind == "llm" else {})
    for key, kind in wanted.items():
        if not isinstance(config.get(key), kind):
            raise CheckpointError(f"{file} has no {key}, as a checkpoint's does.", hint)


def companions(source: Path) -> Iterator[Path]:
    """Yield the files of a model folder that belong beside the weights: tokenizer, generation config, templates."""
    for pattern in COPIED:
        for file in sorted(source.glob(pattern)):
            if file.name not in OWN:
                yield file


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` to ``path`` so that a crash leaves the old file or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(data, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def copy_companions(source: Path, target: Path) -> None:
    """Copy the files that go with the weights."""
    for file in companions(source):
        shutil.copyfile(file, target / file.name)
