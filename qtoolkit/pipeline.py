"""The whole run: one block at a time through calibrate, transform and pack, resumable at every block."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qtoolkit import __version__, architecture, checkpoint, data, registry
from qtoolkit import recipe as recipes
from qtoolkit.calibration import capture
from qtoolkit.calibration.options import read as read_options
from qtoolkit.errors import ModelError, QToolkitError
from qtoolkit.job import Job, disk_errors
from qtoolkit.recipe import Recipe
from qtoolkit.source import Source, resolve
from qtoolkit.stages import Block, Context, Packer, Stream, Transform

SHARD_BYTES = 4 * 10**9
CALIBRATION, REST = "calibration", "rest"


class Progress(Protocol):
    """Whoever wants to watch a run: the command line draws it."""

    def start(self, blocks: int, done: int) -> None:
        """A run of ``blocks`` blocks begins, of which ``done`` were finished by an earlier, interrupted run."""
        ...

    def say(self, text: str) -> None:
        """Something worth a line happened."""
        ...

    def block(self, name: str, error: float) -> None:
        """A block is finished; ``error`` is the mean relative error of its layers."""
        ...


class Silent:
    """Watches without a word: the default of the Python interface."""

    def start(self, blocks: int, done: int) -> None:
        """Say nothing."""

    def say(self, text: str) -> None:
        """Say nothing."""

    def block(self, name: str, error: float) -> None:
        """Say nothing."""


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
    model: str | Path,
    recipe: str | Path | Recipe = "w4a8",
    output: str | Path = "quantized",
    *,
    changes: Mapping[str, Any] | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Quantize a Hugging Face causal LM and write a checkpoint folder.

    Running the same call again after an interruption goes on where it stopped and ends with the same bytes.

    Args:
        model: folder, hub name, or ``tiny``.
        recipe: preset name, YAML file, or a Recipe.
        output: folder to make; must not hold anything yet.
        changes: recipe values by dotted key, such as ``{"calibration.samples": 64}``.
        fresh: forget an interrupted run, and replace a finished checkpoint.
        progress: is told about every block.

    Raises:
        QToolkitError: see ``qtoolkit.errors``; the message is one sentence, the hint says what to do.
    """
    began = time.monotonic()
    settings = recipe if isinstance(recipe, Recipe) else recipes.load(recipe, changes)
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
        self.packer: Packer = registry.packers.get(recipe.packer)
        self.skeleton = architecture.skeleton(source)
        self.dtype = architecture.stored_dtype(source)
        self.context = Context(recipe.scheme, self.dtype, progress.say)
        self.blocks = len(self.skeleton.blocks)
        self._refuse_if_nothing_fits()

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
        stream = capture.embed(self.skeleton, self.source, tokens)
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
        rest = {name: self._stored(name) for name in self.source.files if not self._in_block(name)}
        job.save(REST, rest)

    def assemble(self, job: Job) -> None:
        """Put the finished parts together as a checkpoint folder, in the job's staging place."""
        staging = job.staging
        with disk_errors(job.output):
            staging.mkdir(exist_ok=True)
            for leftover in staging.iterdir():
                leftover.unlink()
            checkpoint.copy_companions(self.source.path, staging)
            files = _write_shards(job, [*map(_part, range(self.blocks)), REST], staging)
            facts = {self._name(i): job.facts(_part(i)) for i in range(self.blocks)}
            layers = tuple(_layer_records(facts, self.recipe.scheme.name))
            unquantized = tuple(
                checkpoint.Unquantized(name=f"{block}.{name}", reason=reason)
                for block, fact in facts.items()
                for name, reason in fact["refused"].items()
            )
            ignore = [*self.recipe.keep, *(row.name for row in unquantized)]
            config = {k: v for k, v in self.source.config.items() if k != "torch_dtype"}
            config["dtype"] = str(self.dtype).removeprefix("torch.")
            if layers:
                config["quantization_config"] = checkpoint.quantization_config(
                    self.recipe.scheme, list(dict.fromkeys(ignore))
                )
            checkpoint.write_json(staging / "config.json", config)
            manifest = checkpoint.Manifest(
                source=self.source.name,
                revision=self.source.revision,
                source_digest=self.source.digest(),
                recipe=self.recipe.model_dump(mode="json"),
                digest=self.recipe.digest,
                scheme=self.recipe.scheme,
                seed=self.recipe.calibration.seed,
                calibration_tokens=job.tensors(CALIBRATION)["tokens"].numel(),
                versions={"qtoolkit": __version__, **{n: version(n) for n in ("torch", "transformers")}},
                packing=(self.recipe.packer,),
                layers=layers,
                groups=tuple(_group_records(facts)),
                unquantized=unquantized,
                bytes_before=self.source.bytes,
                bytes_after=sum(files.values()),
                files=files,
            )
            checkpoint.write_json(staging / checkpoint.MANIFEST, manifest.model_dump(mode="json"))

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
        n, k = module.get_submodule(name).weight.shape  # type: ignore[union-attr, misc]
        return self.packer.refuse(int(n), int(k), self.recipe.scheme)

    def _name(self, index: int) -> str:
        return f"{self.skeleton.architecture.blocks}.{index}"

    def _in_block(self, name: str) -> bool:
        return name.startswith(f"{self.skeleton.architecture.blocks}.")

    def _stored(self, name: str) -> Tensor:
        tensor = self.source.read(name)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _calibration_tokens(self) -> Tensor:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        wanted = self.recipe.calibration
        tokenizer = _load_tokenizer(AutoTokenizer, self.source)
        length = min(wanted.length, int(getattr(self.skeleton.config, "max_position_embeddings", wanted.length)))
        if wanted.data != "self":
            texts = data.documents(wanted.data, tokenizer)
            tokens = data.windows(texts, tokenizer, wanted.samples, length, wanted.seed)
            if len(tokens) < wanted.samples:
                self.progress.say(f"the text gives {len(tokens)} windows of {length} tokens, not {wanted.samples}")
            return tokens
        first = data.start_tokens(tokenizer)
        self.progress.say(f"the model writes {wanted.samples} x {length} tokens to calibrate on")
        for name in self.source.files:
            self.source.read_finite(name)  # a model with a NaN writes nothing: name the layer now
        model = AutoModelForCausalLM.from_pretrained(self.source.path, dtype=torch.float32).eval()
        begin = int(first[0]) if len(first) else int(tokenizer.eos_token_id or 0)
        return data.self_written(model, begin, wanted.samples, length, wanted.seed)

    def _block(self, index: int) -> Block:
        block = self.skeleton.block(index, self.source)
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
        shapes = {name: list(block.quantized[name].codes.shape) for name in layers}
        return {"layers": layers, "shapes": shapes, "groups": groups, "refused": block.refused}

    def _pack(self, block: Block) -> dict[str, Tensor]:
        packed = {f"{name}.weight" for name in block.quantized}
        tensors = {
            f"{block.name}.{name}": tensor.to(self.dtype)
            for name, tensor in block.module.state_dict().items()
            if name not in packed
        }
        for name, weight in block.quantized.items():
            for local, tensor in self.packer.pack(weight).items():
                tensors[f"{block.name}.{name}.{local}"] = tensor
        self._round_floats(block)
        return tensors

    def _restore(self, block: Block, tensors: Mapping[str, Tensor]) -> None:
        """Give ``block`` the weights an earlier run stored, so that the stream behind it is the same."""
        local = {name.removeprefix(f"{block.name}."): tensor for name, tensor in tensors.items()}
        state = block.module.state_dict()
        for name, _ in block.linears():
            parts = {p.removeprefix(f"{name}."): t for p, t in local.items() if p.startswith(f"{name}.weight_")}
            state[f"{name}.weight"] = self.packer.unpack(parts).dequantize()
        state |= {name: local[name].float() for name in state if name in local}
        block.module.load_state_dict(state)

    def _round_floats(self, block: Block) -> None:
        """Round what stays in float to the stored dtype, so that the next block sees what will be served."""
        for name, parameter in block.module.named_parameters():
            if name.removesuffix(".weight") not in block.quantized:
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


def _load_tokenizer(loader: Any, source: Source) -> Any:
    try:
        return loader.from_pretrained(source.path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise QToolkitError(f"{source.name} has no usable tokenizer: {reason}", "Is the folder complete?") from None


def _write_shards(job: Job, parts: list[str], folder: Path) -> dict[str, int]:
    """Merge the parts into shards of at most ``SHARD_BYTES`` each, with an index when there are several."""
    from safetensors.torch import save_file

    shards: list[list[str]] = [[]]
    filled = 0
    for part in parts:
        size = (job.folder / f"{part}.safetensors").stat().st_size
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(part)
        filled += size
    weight_map: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for number, members in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key: tensor for part in members for key, tensor in job.tensors(part).items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        sizes[name] = (folder / name).stat().st_size
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        checkpoint.write_json(folder / "model.safetensors.index.json", index)
    return sizes


def _layer_records(facts: Mapping[str, Any], scheme: str) -> list[checkpoint.LayerRecord]:
    return [
        checkpoint.LayerRecord(
            name=f"{block}.{name}",
            scheme=scheme,
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
