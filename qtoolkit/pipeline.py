"""The whole run: one block at a time through calibrate, transform and pack, resumable at every block."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qtoolkit import __version__, architecture, assembly, checkpoint, data, recipe as recipes, registry
from qtoolkit.calibration import capture
from qtoolkit.calibration.options import read as read_options
from qtoolkit.errors import ModelError
from qtoolkit.job import Job
from qtoolkit.progress import Progress, Silent
from qtoolkit.recipe import Recipe
from qtoolkit.source import Source, resolve, save
from qtoolkit.stages import Block, Context, Packer, Rewrite, Stream, Transform

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CALIBRATION, REST = "calibration", "rest"


@dataclass(frozen=True)
class Result:
    """What a run made: what ``qtoolkit quantize --json`` prints."""

    ok: bool
    output: str
    scheme: str
    recipe: str
    digest: str
    seconds: float
    bytes_before: int
    bytes_after: int
    peak_rss_bytes: int
    calibration_tokens: int
    layers: list[dict[str, Any]]
    unquantized: list[dict[str, str]]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def quantize(
    model: str | Path | PreTrainedModel,
    recipe: str | Path | Recipe = "w4a8",
    output: str | Path = "quantized",
    *,
    changes: Mapping[str, Any] | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Result:
    """Quantize a Hugging Face causal LM and write a checkpoint folder.

    Running the same call again after an interruption goes on where it stopped and ends with the same bytes.

    Args:
        model: folder, hub name, ``tiny``, or a loaded transformers model, then with its ``tokenizer``.
        recipe: preset name, YAML file, or a Recipe.
        output: folder to make; must not hold anything yet.
        changes: recipe values by dotted key, such as ``{"calibration.samples": 64}``.
        fresh: forget an interrupted run, and replace a finished checkpoint.
        progress: is told about every block.
        tokenizer: goes with a loaded model.

    Raises:
        QToolkitError: see ``qtoolkit.errors``; the message is one sentence, the hint says what to do.
    """
    began = time.monotonic()
    settings = recipe if isinstance(recipe, Recipe) else recipes.load(recipe, changes)
    if not isinstance(model, (str, Path)):
        with TemporaryDirectory(prefix="qtoolkit-model-") as folder:
            saved = save(model, tokenizer, Path(folder))
            return quantize(saved, settings, output, fresh=fresh, progress=progress)
    source = resolve(model)
    run = Run(source, settings, progress or Silent())
    job = Job.open(Path(output), run.fingerprint(), fresh=fresh)
    try:
        if not job.published:
            run.work(job)
            run.assemble(job)
            job.publish()
    finally:
        job.close()
    return _result(checkpoint.read_manifest(job.output), job.output, settings, time.monotonic() - began)


class Run:
    """One model under one recipe; the job on disk holds what is finished."""

    def __init__(self, source: Source, recipe: Recipe, progress: Progress) -> None:
        self.source, self.recipe, self.progress = source, recipe, progress
        self.transforms = build_transforms(recipe)
        self.weights = source  # what blocks are read from: the source, or the source rewritten
        self.packer: Packer = registry.packers.get(recipe.packer)
        self.skeleton = architecture.skeleton(source)
        self.dtype = architecture.stored_dtype(source)
        self.context = Context(recipe.scheme, self.dtype, progress.say)
        self.blocks = len(self.skeleton.blocks)
        self._refuse_if_nothing_fits()
        self._rewrite()

    def fingerprint(self) -> dict[str, Any]:
        """Return everything that decides the result: two runs with the same one may continue each other."""
        return {
            "qtoolkit": __version__,
            "model": self.source.digest(),
            "recipe": self.recipe.digest,
            "torch": torch.__version__,
        }

    def work(self, job: Job) -> None:
        """Finish every block that is not finished yet."""
        done = next((i for i in range(self.blocks) if not job.has(_part(i))), self.blocks)
        if done == self.blocks and job.has(REST):
            return
        if not job.has(CALIBRATION):
            job.save(CALIBRATION, {"tokens": self._calibration_tokens()})
        tokens = job.tensors(CALIBRATION)["tokens"]
        self.progress.start(self.blocks, done)
        stream = capture.embed(self.skeleton, self.weights, tokens)
        for index in range(self.blocks):
            block = self._block(index)
            if index < done:
                self._restore(block, job.tensors(_part(index)))
            else:
                figures = self._transform(block, stream)
                job.save(_part(index), self._pack(block), figures)
                errors = [row["error"] for row in figures["layers"].values()]
                self.progress.block(block.name, sum(errors) / len(errors) if errors else 0.0)
            with capture.quantized_activations(block, self.recipe.scheme.activation_bits):
                stream = capture.advance(block, stream)
        rest = {name: self._stored(name) for name in self.weights.files if not self._in_block(name)}
        job.save(REST, rest)

    def assemble(self, job: Job) -> None:
        """Put the finished parts together as a checkpoint folder, in the job's staging place."""
        blocks = {self._name(index): _part(index) for index in range(self.blocks)}
        tokens = job.tensors(CALIBRATION)["tokens"].numel()
        assembly.assemble(job, self.weights, self.recipe, self.dtype, blocks, REST, tokens)

    def _rewrite(self) -> None:
        """Let the recipe's rewrites change what blocks are read from; the transforms that are left work on blocks."""
        for step, transform in list(self.transforms.items()):
            if isinstance(transform, Rewrite):
                self.weights = transform.rewrite(self.weights, self.skeleton, self.recipe.calibration.seed)
                del self.transforms[step]
        for note in self.weights.notes:
            self.progress.say(note)

    def _refuse_if_nothing_fits(self) -> None:
        reasons = [
            self._reason(self._name(0), name, self.skeleton.blocks[0]) for name in self.skeleton.architecture.targets
        ]
        if all(reasons):
            raise ModelError(
                f"No layer of {self.source.name} can be quantized to {self.recipe.scheme.name}: {reasons[0]}.",
                "Try --group-size channel, or a smaller group.",
            )

    def _reason(self, block: str, name: str, module: nn.Module) -> str | None:
        """Return why the target ``name`` of a block stays in float, or None."""
        if name in self.recipe.keep or f"{block}.{name}" in self.recipe.keep:
            return "the recipe keeps it"
        n, k = module.get_submodule(name).weight.shape  # type: ignore[misc]
        return self.packer.refuse(int(n), int(k), self.recipe.scheme)

    def _name(self, index: int) -> str:
        return f"{self.skeleton.architecture.blocks}.{index}"

    def _in_block(self, name: str) -> bool:
        return name.startswith(f"{self.skeleton.architecture.blocks}.")

    def _stored(self, name: str) -> Tensor:
        tensor = self.weights.read(name)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _calibration_tokens(self) -> Tensor:
        longest = int(getattr(self.skeleton.config, "max_position_embeddings", self.recipe.calibration.length))
        return data.calibration_tokens(self.source, self.recipe.calibration, longest, self.progress.say)

    def _block(self, index: int) -> Block:
        block = self.skeleton.block(index, self.weights)
        for name in block.targets:
            if reason := self._reason(block.name, name, block.module):
                block.refused[name] = reason
        return block

    def _transform(self, block: Block, stream: Stream) -> dict[str, Any]:
        layers: dict[str, dict[str, float]] = {name: {} for name, _ in block.linears()}
        groups: list[dict[str, Any]] = []
        for step, transform in self.transforms.items():
            for name, figures in transform.apply(block, stream, self.context).items():
                if name in layers:
                    layers[name] |= figures
                else:
                    groups.append({"name": name, "step": step, "figures": figures})
            self._round_floats(block)
        shapes = {name: list(block.quantized[name].codes.shape) for name in layers}
        schemes = {name: scheme.name for name, scheme in block.schemes.items()}
        return {"layers": layers, "shapes": shapes, "groups": groups, "refused": block.refused, "schemes": schemes}

    def _pack(self, block: Block) -> dict[str, Tensor]:
        packed = {f"{name}.weight" for name in block.quantized}
        tensors = {
            f"{block.name}.{name}": tensor.to(self.dtype)
            for name, tensor in block.module.state_dict().items()
            if name not in packed
        }
        for name, weight in block.quantized.items():
            for local, tensor in self._packer(block, name).pack(weight).items():
                tensors[f"{block.name}.{name}.{local}"] = tensor
        return tensors

    def _restore(self, block: Block, tensors: Mapping[str, Tensor]) -> None:
        """Give ``block`` the weights an earlier run stored, so that the stream behind it is the same."""
        local = {name.removeprefix(f"{block.name}."): tensor for name, tensor in tensors.items()}
        state = block.module.state_dict()
        for name, _ in block.linears():
            parts = {p.removeprefix(f"{name}."): local.pop(p) for p in list(local) if p.startswith(f"{name}.weight")}
            state[f"{name}.weight"] = self._packer(block, name).unpack(parts).dequantize()
        state |= {name: local[name].float() for name in state if name in local}
        block.module.load_state_dict(state)

    def _packer(self, block: Block, name: str) -> Packer:
        return self.packer if name not in block.schemes else registry.packers.get("int8")

    def _round_floats(self, block: Block) -> None:
        """Round what stays in float to the stored dtype, so that whatever follows sees what will be served."""
        targets = {f"{name}.weight" for name, _ in block.linears()}
        for name, parameter in block.module.named_parameters():
            if name not in targets:
                parameter.data = parameter.data.to(self.dtype).float()


def build_transforms(recipe: Recipe) -> dict[str, Transform]:
    """Return the recipe's transforms in order, with validated options.

    Raises:
        RequestError: an unknown step or option.
    """
    built = {}
    for step, values in recipe.steps.items():
        kind = registry.transforms.get(step)
        built[step] = kind(read_options(kind.Options, step, values or {}))
    return built


def peak_rss_bytes() -> int:
    """Return the most memory this process has held, in bytes."""
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _part(index: int) -> str:
    return f"block-{index:05d}"


def _result(manifest: checkpoint.Manifest, output: Path, recipe: Recipe, seconds: float) -> Result:
    return Result(
        ok=True,
        output=str(output),
        scheme=manifest.scheme.name,
        recipe=recipe.name,
        digest=manifest.digest,
        seconds=round(seconds, 2),
        bytes_before=manifest.bytes_before,
        bytes_after=manifest.bytes_after,
        peak_rss_bytes=peak_rss_bytes(),
        calibration_tokens=manifest.calibration_tokens,
        layers=[{"name": row.name, "scheme": row.scheme, "error": row.error} for row in manifest.layers],
        unquantized=[row.model_dump() for row in manifest.unquantized],
    )
