"""Putting the finished parts of a run together: weight files, config.json and qtoolkit.json, in a staging folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qtoolkit import __version__, checkpoint
from qtoolkit.architecture import Skeleton
from qtoolkit.bridges import written
from qtoolkit.job import Job, disk_errors
from qtoolkit.recipe import Recipe
from qtoolkit.shards import join
from qtoolkit.source import Source

SHARD_BYTES = 4 * 10**9


def assemble(
    job: Job,
    source: Source,
    skeleton: Skeleton,
    recipe: Recipe,
    dtype: torch.dtype,
    blocks: Mapping[str, str],
    rest: Sequence[str],
    tokens: int,
    choice: checkpoint.Choice | None,
    budget: checkpoint.BudgetRecord | None,
) -> None:
    """Write the checkpoint folder to the job's staging place.

    Args:
        job: holds the finished parts.
        source: the float model, whose config and companion files go with the weights.
        skeleton: tells how its files name what the parts hold, and what is never quantized.
        recipe: what was done.
        dtype: in which floats are stored.
        blocks: name of every block and of the part that holds it, in order.
        rest: names of the parts with everything outside the blocks.
        tokens: calibration tokens used.
        choice: how outliers are treated, if that was measured.
        budget: what a size budget was spent on, if there was one.
    """
    staging, stored = job.staging, skeleton.architecture.stored
    with disk_errors(job.output):
        staging.mkdir(exist_ok=True)
        for leftover in staging.iterdir():
            leftover.unlink()
        checkpoint.copy_companions(source.path, staging)
        facts = {name: job.facts(part) for name, part in blocks.items()}
        for part in rest:
            job.facts(part)  # a damaged part is told before parts are joined
        files = _write_shards(job, [*blocks.values(), *rest], staging, stored)
        unquantized = tuple(
            checkpoint.Unquantized(name=stored(f"{block}.{name}"), reason=reason)
            for block, fact in facts.items()
            for name, reason in fact["refused"].items()
        )
        floats = [
            stored(f"{block}.{name}")
            for block, module in zip(blocks, skeleton.blocks, strict=True)
            for name in skeleton.architecture.within(module).floats
        ]
        layers = tuple(_layer_records(facts, recipe.scheme.name, stored))
        packed = {row.name for row in layers}
        linear = [stored(name) for name, module in skeleton.model.named_modules() if isinstance(module, nn.Linear)]
        others = [name for name in linear if name not in packed]  # the head, whatever the recipe says of it
        ignore = list(dict.fromkeys([*recipe.keep, *(row.name for row in unquantized), *floats, *others]))
        config = {key: value for key, value in source.config.items() if key != "torch_dtype"}
        config["dtype"] = str(dtype).removeprefix("torch.")
        schemes = {row.name: row.parsed_scheme for row in layers if row.scheme != recipe.scheme.name}
        experts = skeleton.architecture.experts
        config["quantization_config"] = written.quantization_config(
            recipe.packer, recipe.scheme, ignore, schemes, stored(f".{experts.module}.") if experts else ""
        )
        checkpoint.write_json(staging / "config.json", config)
        manifest = checkpoint.Manifest(
            source=source.name,
            revision=source.revision,
            source_digest=source.digest(),
            recipe=recipe.model_dump(mode="json"),
            digest=recipe.digest,
            scheme=recipe.scheme,
            seed=recipe.calibration.seed,
            calibration_tokens=tokens,
            versions={"qtoolkit": __version__, **{name: version(name) for name in ("torch", "transformers")}},
            packing=(recipe.packer, *(["int8"] if schemes else [])),
            layers=layers,
            groups=tuple(_group_records(facts)),
            unquantized=unquantized,
            choice=choice,
            budget=budget and _with_stored_names(budget, stored),
            notes=source.notes,
            bytes_before=source.bytes,
            bytes_after=sum(files.values()),
            files=files,
        )
        checkpoint.write_json(staging / checkpoint.MANIFEST, manifest.model_dump(mode="json"))


def _write_shards(job: Job, parts: list[str], folder: Path, stored: Callable[[str], str]) -> dict[str, int]:
    """Merge the parts into shards of at most ``SHARD_BYTES`` each, with an index when there are several.

    ``stored`` gives the name under which a module's tensor is stored.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for part in parts:
        size = job.file(part).stat().st_size
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(part)
        filled += size
    weight_map: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for number, members in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = join([job.file(part) for part in members], folder / name, stored)
        weight_map |= dict.fromkeys(tensors, name)
        sizes[name] = (folder / name).stat().st_size
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        checkpoint.write_json(folder / "model.safetensors.index.json", index)
    return sizes


def _with_stored_names(budget: checkpoint.BudgetRecord, stored: Callable[[str], str]) -> checkpoint.BudgetRecord:
    rows = [row.model_copy(update={"layers": tuple(map(stored, row.layers))}) for row in budget.rows]
    return budget.model_copy(update={"rows": tuple(rows)})


def _layer_records(facts: Mapping[str, Any], scheme: str, stored: Callable[[str], str]) -> list[checkpoint.LayerRecord]:
    return [
        checkpoint.LayerRecord(
            name=stored(f"{block}.{name}"),
            scheme=fact.get("schemes", {}).get(name, scheme),
            shape=tuple(fact["shapes"][name]),
            error=figures["error"],
            figures={key: value for key, value in figures.items() if key != "error"},
        )
        for block, fact in facts.items()
        for name, figures in fact["layers"].items()
    ]


def _group_records(facts: Mapping[str, Any]) -> list[checkpoint.GroupRecord]:
    return [
        checkpoint.GroupRecord(name=f"{block}.{row['name']}", step=row["step"], figures=row["figures"])
        for block, fact in facts.items()
        for row in fact["groups"]
    ]
