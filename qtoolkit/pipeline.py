"""The whole run: one block at a time through calibrate, transform and pack, resumable at every block."""

from __future__ import annotations

import os
import re
import resource
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qtoolkit import (
    __version__,
    architecture,
    assembly,
    checkpoint,
    data,
    device as devices,
    memory,
    recipe as recipes,
    registry,
)
from qtoolkit.bridges import written
from qtoolkit.calibration import budget, capture, choice, experts, halves, products, smoothing
from qtoolkit.calibration.gradients import Gradients
from qtoolkit.calibration.options import read as read_options
from qtoolkit.errors import ModelError, RequestError
from qtoolkit.job import Job
from qtoolkit.progress import Progress, Silent
from qtoolkit.recipe import Recipe
from qtoolkit.registry import suggest
from qtoolkit.scheme import Scheme
from qtoolkit.source import Source, resolve, save
from qtoolkit.stages import Block, Context, Packer, Rewrite, Stream, Transform, Way
from qtoolkit.waiting import Waiting

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CALIBRATION, CHOICE, BUDGET, REST = "calibration", "choice", "budget", "rest"


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
    device: str = devices.AUTO,
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
        device: where blocks are calibrated, one at a time: "cpu", "cuda", or "auto", the GPU where there is one. A run
            goes on only on the kind of device that it began on, because the last bits of its sums differ.

    Raises:
        QToolkitError: see ``qtoolkit.errors``; the message is one sentence, the hint says what to do.
    """
    began = time.monotonic()
    settings = recipe if isinstance(recipe, Recipe) else recipes.load(recipe, changes)
    if not isinstance(model, (str, Path)):
        with TemporaryDirectory(prefix="qtoolkit-model-") as folder:
            saved = save(model, tokenizer, Path(folder))
            return quantize(saved, settings, output, fresh=fresh, progress=progress, device=device)
    where = devices.choose(device)
    memory.keep_little()
    source = resolve(model)
    run = Run(source, settings, progress or Silent(), where)
    job = Job.open(Path(output), run.fingerprint(), fresh=fresh)
    try:
        if not job.published:
            with products.fast(where, int(run.skeleton.config.hidden_size)):
                run.prepare(job)
                run.work(job)
            run.assemble(job)
            job.publish()
    finally:
        job.close()
    return _result(checkpoint.read_manifest(job.output), job.output, settings, time.monotonic() - began)


class Run:
    """One model under one recipe; the job on disk holds what is finished."""

    def __init__(self, source: Source, recipe: Recipe, progress: Progress, device: torch.device = devices.CPU) -> None:
        self.source, self.recipe, self.progress = source, recipe, progress
        self.weights, self.transforms = source, build_transforms(recipe)  # until ``prepare`` has decided
        self.kinds: dict[str, str] = {}  # layers that a budget gives more than the recipe's scheme
        self.choice: checkpoint.Choice | None = None
        self.budget: checkpoint.BudgetRecord | None = None
        self.packer: Packer = registry.packers.get(recipe.packer)
        if recipe.packer not in written.LAYOUTS:
            known = ", ".join(written.LAYOUTS)
            raise RequestError(f"The packer {recipe.packer} stores no layers of llm models.", f"Known: {known}.")
        if recipe.packer not in written.COMPRESSED and recipe.budget.bits is not None:
            raise written.mixed(recipe.packer)
        self.skeleton = replace(architecture.skeleton(source), device=device)
        self.dtype = architecture.stored_dtype(source)
        self.context = Context(recipe.scheme, self.dtype, progress.say)
        self.blocks = len(self.skeleton.blocks)
        self._refuse_unknown_kept()
        self._refuse_if_nothing_fits()
        if recipe.budget.bits is not None:
            blocks = (self._decided(self.skeleton.described(index)) for index in range(self.blocks))
            budget.check(blocks, recipe.budget.bits, self.context)

    def fingerprint(self) -> dict[str, Any]:
        """Return what decides the result: two runs with the same one may continue each other.

        How many threads compute, and on which instructions, moves last bits and may differ between the two.
        """
        return {
            "qtoolkit": __version__,
            "model": self.source.digest(),
            "recipe": self.recipe.deciding(),
            "order": list(self.recipe.steps),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "device": self.skeleton.device.type,
        }

    def prepare(self, job: Job) -> None:
        """Decide, before the first block, what the model's own measurements decide; the job remembers it."""
        if not job.has(CALIBRATION):
            text, random = self._calibration_tokens()
            job.save(CALIBRATION, {"text": text, "random": random})
        text = job.tensors(CALIBRATION)["text"]  # trials are about nothing else
        method: str | None = self.recipe.outliers.method
        if method == "auto":
            if not job.has(CHOICE):
                job.save(CHOICE, {}, self._choose(text).model_dump())
            self.choice = checkpoint.Choice.model_validate(job.facts(CHOICE))
            method = self.choice.chosen
        self.weights, self.transforms = self._candidate(method)
        for note in self.weights.notes:
            self.progress.say(note)
        if self.recipe.budget.bits is not None:
            if not job.has(BUDGET):
                job.save(BUDGET, {}, self._spend(text, self.recipe.budget.bits).model_dump())
            self.budget = checkpoint.BudgetRecord.model_validate(job.facts(BUDGET))
            self.kinds = {name: row.kind for row in self.budget.rows for name in row.layers}

    def work(self, job: Job) -> None:
        """Finish every block that is not finished yet."""
        done = next((i for i in range(self.blocks) if not job.has(_part(i))), self.blocks)
        if done == self.blocks and all(job.has(part) for part in self._rest().values()):
            return
        tokens = _tokens(job)
        self.progress.start(self.blocks, done)
        gradients = None
        if any(getattr(transform, "reads_gradients", False) for transform in self.transforms.values()):
            memory.trim()
            gradients = Gradients(self.skeleton, self.weights, self._block, tokens, job)
            gradients.measure()
        memory.trim()
        stream = capture.embed(self.skeleton, self.weights, tokens, folder=job.folder)
        compared = any(getattr(transform, "reads_floats", False) for transform in self.transforms.values())
        before_last = [*self.transforms.values()][:-1]
        kept = all(getattr(transform, "keeps_function", False) for transform in before_last)
        own = _copied(stream.batches) if compared else []  # both are overwritten on their way
        floats = Stream(own, stream.kwargs, device=stream.device)
        for index in range(self.blocks):
            block = self._block(self.weights, index)
            stream.floats = floats.batches if compared else []
            if index < done:
                block.schemes |= {name: Scheme.named(kind) for name, kind in job.facts(_part(index))["schemes"].items()}
                self._restore(block, job.tensors(_part(index)))
                smoothed = job.tensors(_smoothed(index)) if job.has(_smoothed(index)) else {}
            else:
                if gradients:
                    gradients.tell(block, index)
                rounded = self._round_floats(block)
                same = kept and not rounded  # what the block computes in float is the float network's
                stream.way, stream.floats_way = Way(moves=True), Way(moves=compared and same)
                figures = self._transform(block, stream)
                block.probe = None
                smoothed = block.smoothed if stream.floats_way.passed else {}
                if smoothed:
                    job.save(_smoothed(index), {name: scales.cpu() for name, scales in smoothed.items()})
                job.save(_part(index), self._pack(block), figures)
                if gradients:
                    gradients.forget(index)
                errors = [row["error"] for row in figures["layers"].values()]
                self.progress.block(block.name, sum(errors) / len(errors) if errors else 0.0)
            floats.way, stream.floats = stream.floats_way, []
            stream = capture.advance(block, stream, bits=self.recipe.scheme.activation_bits, spent=True)
            del block  # before the next is read
            memory.trim()
            if compared and not floats.way.behind and index + 1 < self.blocks:  # a stream more costs more than reading
                block = self._block(self.weights, index)
                smoothing.fold_again(block, smoothed)  # as where it was passed: the last bits may differ
                floats = capture.advance(block, floats, spent=True)
                del block
        for name, part in self._rest().items():
            job.save(part, {name: self._stored(name)})

    def assemble(self, job: Job) -> None:
        """Put the finished parts together as a checkpoint folder, in the job's staging place."""
        blocks = {self._name(index): _part(index) for index in range(self.blocks)}
        tokens = _tokens(job).numel()
        dtype, choice, budget = self.dtype, self.choice, self.budget
        skeleton, rest = self.skeleton, [*self._rest().values()]
        assembly.assemble(job, self.weights, skeleton, self.recipe, dtype, blocks, rest, tokens, choice, budget)

    def _candidate(
        self, method: str | None, options: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    ) -> tuple[Source, dict[str, Transform]]:
        """Return what blocks are read from under ``method``, and the transforms of a block."""
        weights, transforms = self.source, build_transforms(self.recipe, method, options)
        for step, transform in list(transforms.items()):
            if isinstance(transform, Rewrite):
                weights = transform.rewrite(weights, self.skeleton, self.recipe.calibration.seed)
                del transforms[step]
        return weights, transforms

    def _choose(self, tokens: Tensor) -> checkpoint.Choice:
        candidates = {name: choice.Candidate(*self._candidate(name, choice.LIGHT)) for name in recipes.METHODS}
        count, context = self.recipe.outliers.blocks, self.context
        found = choice.choose(self.skeleton, self.source, candidates, self._block, tokens, count, context)
        figures = ", ".join(f"{name} {value:.4f}" for name, value in found.decisive.items())
        self.progress.say(f"outliers: {found.chosen}, by divergence on held-out text ({figures} nats)")
        return found

    def _spend(self, tokens: Tensor, bits: float) -> checkpoint.BudgetRecord:
        units = budget.measure(self.skeleton, self.weights, self.transforms, self._block, tokens, self.context)
        record = budget.spend(units, bits)
        if all(row.kind == budget.FLOAT for row in record.rows):
            raise budget.too_large(bits, self.context)
        counts = Counter(row.kind for row in record.rows for _ in row.layers)
        said = ", ".join(f"{count} layers {kind}" for kind, count in counts.items())
        self.progress.say(f"budget of {bits:g} bits a weight: {record.used:.3f} used ({said})")
        return record

    def _refuse_unknown_kept(self) -> None:
        """Refuse what the recipe keeps and the model does not have: a layer's full name, or its name within a block."""
        modules = self.skeleton.model.named_modules()
        leaves = [name for name, module in modules if any(True for _ in module.parameters(recurse=False))]
        stored = self.skeleton.architecture.stored
        within = {".".join(name.split(".")[self._name(0).count(".") + 1 :]) for name in leaves if self._in_block(name)}
        known = {*leaves, *map(stored, leaves), *within}
        for name in self.recipe.keep:
            if name not in known:
                outside = {stored(leaf) for leaf in leaves if not self._in_block(leaf)}
                short = {local for local in within if not re.search(r"\.\d+\.", local)}  # not every expert's
                local = re.sub(rf"^{re.escape(self.skeleton.architecture.blocks)}\.\d+\.", "", name)
                raise RequestError(
                    f"The recipe keeps {name!r}, which is no layer of {self.source.name}.",
                    f"{suggest(local, short | outside)} Layers go by their full name, or by that within every block.",
                )

    def _refuse_if_nothing_fits(self) -> None:
        first = self.skeleton.blocks[0]
        targets = self.skeleton.architecture.within(first).targets
        reasons = [self._reason(self._name(0), name, first) for name in targets]
        if all(reasons):
            hint = "Try --group-size channel, or a smaller group."
            if self.recipe.scheme.weight_bits == 8:
                hint = "Write packer: int8 into the recipe, and group_size: channel into its scheme."
            raise ModelError(
                f"No layer of {self.source.name} can be quantized to {self.recipe.scheme.name}: {reasons[0]}.", hint
            )

    def _reason(self, block: str, name: str, module: nn.Module) -> str | None:
        """Return why the target ``name`` of a block stays in float, or None."""
        full = f"{block}.{name}"
        if {name, full, self.skeleton.architecture.stored(full)} & {*self.recipe.keep}:
            return "the recipe keeps it"
        n, k = module.get_submodule(name).weight.shape  # type: ignore[misc]
        return self.packer.refuse(int(n), int(k), self.recipe.scheme)

    def _name(self, index: int) -> str:
        return f"{self.skeleton.architecture.blocks}.{index}"

    def _in_block(self, name: str) -> bool:
        return name.startswith(f"{self.skeleton.architecture.blocks}.")

    def _rest(self) -> dict[str, str]:
        """Return the part that holds each tensor outside the blocks."""
        outside = [name for name in self.weights.files if not self._in_block(name)]
        return {name: f"{REST}-{number:05d}" for number, name in enumerate(sorted(outside))}

    def _stored(self, name: str) -> Tensor:
        tensor = self.weights.read(name)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _calibration_tokens(self) -> tuple[Tensor, Tensor]:
        wanted, skeleton = self.recipe.calibration, self.skeleton
        longest, vocabulary = skeleton.longest or wanted.length, skeleton.config.vocab_size
        return data.calibration_tokens(self.source, wanted, longest, vocabulary, self.progress.say, skeleton.device)

    def _block(self, weights: Source, index: int) -> Block:
        return halves.hasten(self._decided(self.skeleton.block(index, weights)), self.skeleton.device)

    def _decided(self, block: Block) -> Block:
        """Return ``block`` with what is known of its layers before it is calibrated: floats, schemes."""
        for name in block.targets:
            kind = self.kinds.get(f"{block.name}.{name}", self.recipe.scheme.name)
            if reason := self._reason(block.name, name, block.module):
                block.refused[name] = reason
            elif kind == budget.FLOAT:
                block.refused[name] = f"the budget of {self.recipe.budget.bits:g} bits a weight keeps it"
            elif kind != self.recipe.scheme.name:
                block.schemes[name] = Scheme.named(kind)
        experts.refuse_together(block)
        return block

    def _transform(self, block: Block, stream: Stream) -> dict[str, Any]:
        layers: dict[str, dict[str, float]] = {name: {} for name, _ in block.linears()}
        groups: list[dict[str, Any]] = []
        for step, transform in self.transforms.items():
            for name, figures in experts.apply(transform, block, stream, self.context).items():
                if name in layers:
                    layers[name] |= figures
                else:
                    groups.append({"name": name, "step": step, "figures": figures})
            if self._round_floats(block):
                stream.floats_way.moves = False
        if missed := [name for name in layers if name not in block.quantized]:
            steps = ", ".join(self.transforms)
            raise RequestError(f"No step ({steps}) has rounded {block.name}.{missed[0]}.", "Add gptq: {} as the last.")
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
        return {name: tensor.cpu() for name, tensor in tensors.items()}

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

    def _round_floats(self, block: Block) -> bool:
        """Round what stays in float to the stored dtype, so that whatever follows sees what will be served.

        Returns whether that changed anything.
        """
        targets = {f"{name}.weight" for name, _ in block.linears()}
        changed = False
        for name, parameter in block.module.named_parameters():
            if name not in targets:
                before, parameter.data = parameter.data, parameter.data.to(self.dtype).float()
                changed = changed or not torch.equal(before, parameter.data)
        return changed


def build_transforms(
    recipe: Recipe, method: str | None = None, options: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
) -> dict[str, Transform]:
    """Return the recipe's transforms in order, with validated options.

    Args:
        recipe: names the steps.
        method: one of ``recipe.METHODS``, or None for the steps as written.
        options: of a step, instead of the recipe's.

    Raises:
        RequestError: an unknown step or option, or a step for the other kind of models.
    """
    built = {}
    own, other = ("vision", "llm") if "kind" in type(recipe).model_fields else ("llm", "vision")
    for step, values in recipe.under(method).items():
        if step in registry.STEPS[other]:
            known = ", ".join(registry.STEPS[own])
            raise RequestError(f"The step {step} is for {other} models, not for {own} models.", f"Known: {known}.")
        kind = registry.transforms.get(step)
        built[step] = kind(read_options(kind.Options, step, {**(values or {}), **options.get(step, {})}))
    if own == "llm":
        _check_rounding(recipe, built)
    return built


def _check_rounding(recipe: Recipe, built: Mapping[str, Transform]) -> None:
    """Refuse steps of which none rounds, or one that would change what is rounded already."""
    order = built if recipe.outliers.method is None else [step for step in recipe.under("both") if step in built]
    steps = {step: getattr(built[step], "rounds", None) for step in order if not isinstance(built[step], Rewrite)}
    if all(rounds is False for rounds in steps.values()):  # one of others' making may say nothing of it
        raise RequestError(f"No step of the recipe {recipe.name} rounds the weights.", "Add gptq: {} under its steps.")
    rounded = ""
    for step, rounds in steps.items():
        if rounded and rounds is not True:
            raise RequestError(
                f"The step {step} stands behind {rounded}, which has rounded the weights that it would change.",
                f"Put {step} before {rounded}.",
            )
        rounded = step if rounds else rounded


def peak_rss_bytes() -> int:
    """Return the most memory this process has held, in bytes.

    On Linux from /proc: what getrusage says counts the parent's memory, too, from before the process became itself.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else ():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _copied(batches: list[Tensor] | Waiting) -> list[Tensor] | Waiting:
    """Return a copy of a stream's batches, where they are: on a GPU or on the disk."""
    return [batch.clone() for batch in batches] if isinstance(batches, list) else Waiting(batches.folder, batches)


def _tokens(job: Job) -> Tensor:
    """Return all that is calibrated on, text first, int64 [windows, length]."""
    kept = job.tensors(CALIBRATION)
    return torch.cat([kept["text"], kept["random"]])


def _part(index: int) -> str:
    return f"block-{index:05d}"


def _smoothed(index: int) -> str:
    return f"smoothed-{index:05d}"


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
