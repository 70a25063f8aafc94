"""The vision run: the recipe's transforms over the whole network, then pack, measure what was packed, publish."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtoolkit import __version__, checkpoint, recipe as recipes, registry
from qtoolkit.errors import DataError, NumericError, RequestError
from qtoolkit.job import Job, disk_errors
from qtoolkit.pipeline import build_transforms, peak_rss_bytes
from qtoolkit.registry import suggest
from qtoolkit.source import Source
from qtoolkit.stages import Block
from qtoolkit.vision import data, measure, models, runtime, similarity
from qtoolkit.vision.context import Progress, Step, VisionContext, stream, unseen
from qtoolkit.vision.layers import Binary, Butterfly
from qtoolkit.vision.matrix import Geometry, to_matrix, weight_of
from qtoolkit.vision.models import Model
from qtoolkit.vision.record import VisionManifest, VisionRecipe

TRAINING_STEPS = ("recover",)
WEIGHTS = "model.safetensors"
LOGS = ("training.csv", "tensorboard")  # what the trainer writes while it runs
COMPARED = 8  # images on which the packed network is compared with what was packed
ALIKE = 64  # images on which layers are compared with what they were
SAME = 1e-4  # of the largest logit: float32 sums in another order differ by less
PACKED_AS = {"binary": Binary, "debut": Butterfly}  # patterns whose layers are trained in packed form


@dataclass(frozen=True)
class Compressed:
    """What a run made: what ``qtoolkit compress --json`` prints."""

    ok: bool
    output: str
    scheme: str
    recipe: str
    digest: str
    seconds: float
    bytes_before: int
    bytes_after: int
    peak_rss_bytes: int
    figures: dict[str, float]
    layers: list[dict[str, Any]]
    unquantized: list[dict[str, str]]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def compress(
    model: str,
    recipe: str | Path | VisionRecipe = "nm",
    output: str | Path = "compressed",
    *,
    weights: str | Path | None = None,
    test: str | None = None,
    changes: Mapping[str, Any] | None = None,
    fresh: bool = False,
    say: Progress | None = None,
    step: Step = unseen,
) -> Compressed:
    """Compress an image classifier and write a checkpoint folder.

    Running the same call again after an interruption goes on at the last whole epoch.

    Args:
        model: a name of ``qtoolkit list vision``, or a transformers image classifier: folder or hub name.
        recipe: preset name, YAML file, or a VisionRecipe.
        output: folder to make; must not hold anything yet.
        weights: an own network's trained weights, ``.npz`` or ``.safetensors``; without them the recipe must train.
        test: images on which accuracy is measured, before and after; see ``qtoolkit.vision.data.load``.
        changes: recipe values by dotted key, such as ``{"recover.epochs": 3}``.
        fresh: forget an interrupted run, and replace a finished checkpoint.
        say: is given every line worth reading.
        step: is told how many training steps are done, and of how many.

    Raises:
        QToolkitError: see ``qtoolkit.errors``; the message is one sentence, the hint says what to do.
    """
    began = time.monotonic()
    settings = recipe if isinstance(recipe, VisionRecipe) else recipes.load(recipe, changes, VisionRecipe)
    resolved = models.resolve(model, weights, settings.calibration.seed)
    if resolved.original is None and not any(step in settings.steps for step in TRAINING_STEPS):
        raise RequestError(
            f"The recipe {settings.name} does not train, and {model} has no weights.", "Add --weights FILE."
        )
    transforms = build_transforms(settings)
    training = data.load(settings.calibration.data, resolved.architecture)
    held_out = data.load(test, resolved.architecture) if test else None
    classes = measure.classes(resolved.network, resolved.architecture)
    for images in (training, held_out):
        if images is not None and int(images.y.max()) >= classes:
            raise DataError(
                f"The data has a class {int(images.y.max())}, but {model} tells {classes} classes apart.",
                "Is it the data set that the model was trained for?",
            )
    fingerprint = {
        "qtoolkit": __version__,
        "model": resolved.digest(),
        "recipe": settings.deciding(),
        "order": list(settings.steps),
        "images": len(training),
        "torch": torch.__version__,
    }
    job = Job.open(Path(output), fingerprint, fresh=fresh)
    try:
        if not job.published:
            run = Run(resolved, settings, training, held_out, say or _silent)
            run.work(transforms, job, step)
            run.assemble(job)
            job.publish()
    finally:
        job.close()
    return _result(job.output, time.monotonic() - began)


class Run:
    """One classifier under one recipe."""

    def __init__(
        self, model: Model, recipe: VisionRecipe, training: data.Images, test: data.Images | None, say: Progress
    ) -> None:
        self.model, self.recipe, self.training, self.test, self.say = model, recipe, training, test, say
        self.source_digest, self.bytes_before = model.digest(), model.bytes
        self.packer = registry.packers.get(recipe.scheme.kind)
        self.block = self._block()
        self.positions = measure.positions(model.network, model.architecture)
        self.figures: dict[str, float] = {"parameters_before": float(_parameters(model.network))}
        self.figures["multiply_adds_before"] = float(self._multiply_adds(_products(model.network)))
        self.empty = _identities(model.network)
        self.report: list[checkpoint.GroupRecord] = []
        self.layer_figures: dict[str, dict[str, float]] = {name: {} for name in self.block.targets}

    def work(self, transforms: Mapping[str, Any], job: Job, watch: Step) -> None:
        """Measure the network as it is, then apply every transform; ``watch`` is told of training steps."""
        original = self.model.original
        if self.test is not None and original is not None:
            self._measure("accuracy_before", original())
        settings = self.recipe.calibration
        choose = registry.selectors.get(settings.select)
        samples, seed, architecture = settings.samples, settings.seed, self.model.architecture
        calibration = choose(self.model.network, self.training, architecture, samples, seed)
        x, self.classes = next(calibration.batches(measure.batch_of(architecture, ALIKE), architecture))
        self.compared, self.dense = x, similarity.grams(self.model.network, self.block.targets, x)
        images = stream(calibration, architecture)
        context = VisionContext(self.recipe.scheme, architecture, self.training, seed, self.say, job, original, watch)
        for step, transform in transforms.items():
            began = time.monotonic()
            for name, figures in transform.apply(self.block, images, context).items():
                if name in self.layer_figures:
                    self.layer_figures[name] |= figures
                else:
                    self.report.append(checkpoint.GroupRecord(name=name, step=step, figures=figures))
            self.say(f"{step}: {time.monotonic() - began:.1f} s")

    def assemble(self, job: Job) -> None:
        """Pack, build the network from what was packed, measure it, and put the folder together."""
        from safetensors.torch import save_file

        kind = self.recipe.scheme.kind
        architecture = self.model.architecture.model_copy(
            update={"groups": self.block.groups, "blocks": "", "dropped": self._dropped()}
        )
        tensors, packed = self._pack()
        network, _ = runtime.assemble(architecture, tensors, packed, kind)
        self._compare(network)
        if self.test is not None:
            self._measure("accuracy_after", network)
        stored, biases = self._sizes(network, tensors, packed)
        plain = sum(p.numel() for name, p in network.named_parameters() if name.rpartition(".")[0] not in packed)
        self.figures["parameters_after"] = float(sum(stored.values()) + biases + plain)
        self.figures["multiply_adds_after"] = float(self._multiply_adds({**_products(network), **stored}))
        self._describe(network, tensors, stored)
        with disk_errors(job.output):
            shutil.rmtree(job.staging, ignore_errors=True)
            job.staging.mkdir()
            for log in LOGS:
                if (job.folder / log).is_dir():
                    shutil.copytree(job.folder / log, job.staging / log)
                elif (job.folder / log).is_file():
                    shutil.copyfile(job.folder / log, job.staging / log)
            save_file({k: t.contiguous() for k, t in tensors.items()}, job.staging / WEIGHTS, {"format": "pt"})
            config = {"model_type": self.model.name, "architecture": self.model.architecture.model_dump(mode="json")}
            if self.model.folder is not None:
                checkpoint.copy_companions(self.model.folder, job.staging)  # the preprocessor, the licence
                config = Source(self.model.folder, self.model.name).config
            checkpoint.write_json(job.staging / "config.json", config)
            manifest = self._manifest(packed, (job.staging / WEIGHTS).stat().st_size)
            checkpoint.write_json(job.staging / checkpoint.MANIFEST, manifest.model_dump(mode="json"))

    def _block(self) -> Block:
        block = self.model.block(self.recipe.scheme.kind)
        known = {*block.targets, *self.model.untouched()}
        for name in self.recipe.keep:
            if name not in known:
                raise RequestError(
                    f"The recipe keeps {name!r}, which is no layer of {self.model.name}.", suggest(name, known)
                )
        for name in block.targets:
            geometry = Geometry.of(block.layer(name))
            reason = self.packer.refuse(geometry.n, geometry.k, self.recipe.scheme)
            if name in self.recipe.keep:
                reason = "the recipe keeps it"
            if reason:
                block.refused[name] = reason
        return block

    def _pack(self) -> tuple[dict[str, Tensor], list[str]]:
        """Return every tensor to store, and the names of the packed layers."""
        network, pattern = self.block.module, self.recipe.scheme
        packed = [name for name in self.block.targets if name not in self.block.refused]
        tensors: dict[str, Tensor] = {}
        for name in packed:
            layer = self.block.layer(name)
            unfit = RequestError(
                f"The steps of {self.recipe.name} do not give {name} the pattern {pattern.name}.",
                "Choose a recipe made for the pattern; `qtoolkit list recipes` shows them.",
            )
            if type(layer) is not PACKED_AS.get(pattern.kind, type(layer)):
                raise unfit
            if isinstance(layer, Binary | Butterfly):
                if pattern.kind not in PACKED_AS:
                    raise unfit
                weight: Any = layer.packed()
            else:
                inputs = Geometry.of(layer).inputs
                try:
                    weight = self.packer.read(to_matrix(weight_of(self.block, name).detach()), pattern, inputs)
                except ValueError:
                    raise unfit from None
            for part, tensor in self.packer.pack(weight).items():
                tensors[f"{name}.{part}"] = tensor
        for name, tensor in network.state_dict().items():
            owner, _, local = name.rpartition(".")
            if owner not in packed or local == "bias":
                tensors[name] = tensor.detach()
        return tensors, packed

    @torch.inference_mode()
    def _compare(self, network: nn.Module) -> None:
        """Note how far the packed network's answers are from those of the network that was packed.

        Raises:
            NumericError: channels were removed that another layer depends on.
        """
        x, _ = next(self.training.first(COMPARED).batches(COMPARED, self.model.architecture))
        expected, found = self.block.module.eval()(x), network(x)
        self.figures["packing_error"] = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
        if self.recipe.scheme.kind == "filter" and self.figures["packing_error"] > SAME:
            raise NumericError(
                f"The narrower network's logits differ by {self.figures['packing_error']:.2%} from the masked one's.",
                "Give --set filters.where=inner (or recover.where), or name the layers under keep in a recipe.",
            )

    def _sizes(
        self, network: nn.Module, tensors: Mapping[str, Tensor], packed: list[str]
    ) -> tuple[dict[str, int], int]:
        """Return how many numbers each packed layer multiplies with, and how many numbers their biases have."""
        if self.recipe.scheme.kind != "filter":
            found = {name: _stored_numbers(name, tensors) for name in packed}
            return found, sum(tensors[f"{name}.bias"].numel() for name in packed if f"{name}.bias" in tensors)
        layers: dict[str, Any] = {name: network.get_submodule(name) for name in packed}  # narrower than what is stored
        biases = sum(layer.bias.numel() for layer in layers.values() if layer.bias is not None)
        return {name: layer.weight.numel() for name, layer in layers.items()}, biases

    def _describe(self, network: nn.Module, tensors: Mapping[str, Tensor], stored: Mapping[str, int]) -> None:
        """Add to every packed layer's figures what it cost and costs, and how alike its outputs still are."""
        after = similarity.grams(network, stored, self.compared)
        enough = len(self.compared) > similarity.NEIGHBOURS
        for name, numbers in stored.items():
            geometry, places = Geometry.of(self.block.layer(name)), self.positions[name]
            dense = geometry.n * geometry.k
            parts = [t for key, t in tensors.items() if key.startswith(f"{name}.weight_")]
            figures = {
                "parameters_before": float(dense),
                "parameters_after": float(numbers),
                "multiply_adds_before": float(places * dense),
                "multiply_adds_after": float(places * numbers),
                "bytes_before": float(4 * dense),
                "bytes_after": float(sum(t.numel() * t.element_size() for t in parts)),
                "cka": similarity.cka(self.dense[name], after[name]),
            }
            if enough:
                figures["gbs"] = similarity.gbs(self.dense[name], after[name])
                figures["modularity_before"] = similarity.modularity(self.dense[name], self.classes)
                figures["modularity_after"] = similarity.modularity(after[name], self.classes)
            self.layer_figures[name] |= figures

    def _multiply_adds(self, products: Mapping[str, int]) -> int:
        """Return the products of one image: places times numbers of every layer."""
        return sum(places * products.get(name, 0) for name, places in self.positions.items())

    def _dropped(self) -> tuple[str, ...]:
        """Return the blocks that a transform has left out."""
        return tuple(sorted(_identities(self.block.module) - self.empty))

    def _measure(self, name: str, network: nn.Module) -> None:
        assert self.test is not None
        self.figures[name] = measure.accuracy(network, self.test, self.model.architecture)
        self.figures["test_images"] = float(len(self.test))
        self.say(f"{name.replace('_', ' ')}: {self.figures[name]:.2%} of {len(self.test)} images")

    def _manifest(self, packed: list[str], size: int) -> VisionManifest:
        layers = []
        for name in packed:
            geometry = Geometry.of(self.block.layer(name))
            figures = dict(self.layer_figures[name])
            error = figures.pop("error", 0.0)
            layers.append(
                checkpoint.LayerRecord(
                    name=name,
                    scheme=self.recipe.scheme.name,
                    shape=(geometry.n, geometry.k),
                    error=error,
                    figures=figures,
                )
            )
        inside = {name for group in self.block.groups for name in group.producers}
        kept = {**self.model.untouched(), **self.block.refused}
        kept = {name: reason for name, reason in kept.items() if name not in packed and name not in inside}
        return VisionManifest(
            kind="vision",
            source=self.model.name,
            architecture=self.model.name if self.model.folder is None else models.TRANSFORMERS,
            source_digest=self.source_digest,
            recipe=self.recipe.model_dump(mode="json"),
            digest=self.recipe.digest,
            scheme=self.recipe.scheme,
            seed=self.recipe.calibration.seed,
            calibration_tokens=min(self.recipe.calibration.samples, len(self.training)),
            versions={"qtoolkit": __version__, "torch": version("torch")},
            packing=(self.recipe.scheme.kind,),
            layers=tuple(layers),
            groups=tuple(self.report),
            unquantized=tuple(checkpoint.Unquantized(name=name, reason=reason) for name, reason in kept.items()),
            bytes_before=self.bytes_before,
            bytes_after=size,
            files={WEIGHTS: size},
            figures=self.figures,
            dropped=self._dropped(),
            channel_groups=self.block.groups if self.model.folder is not None else (),
        )


def _silent(text: str) -> None:
    """Say nothing: the default of the Python interface."""


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _identities(network: nn.Module) -> set[str]:
    return {name for name, module in network.named_modules() if isinstance(module, nn.Identity)}


def _products(network: nn.Module) -> dict[str, int]:
    """Return how many numbers every convolution and linear layer multiplies with at one place."""
    return {
        name: module.weight.numel() for name, module in network.named_modules() if isinstance(module, models.LAYERS)
    }


def _stored_numbers(layer: str, tensors: Mapping[str, Tensor]) -> int:
    """Return how many numbers a packed layer multiplies with: its values, its factors, or its signs."""
    if f"{layer}.weight_words" in tensors:
        return int(tensors[f"{layer}.weight_shape"].prod())
    part = "values" if f"{layer}.weight_values" in tensors else "factors"
    return tensors[f"{layer}.weight_{part}"].numel()


def _result(output: Path, seconds: float) -> Compressed:
    manifest = checkpoint.read_manifest(output)
    assert isinstance(manifest, VisionManifest)
    return Compressed(
        ok=True,
        output=str(output),
        scheme=manifest.scheme.name,
        recipe=str(manifest.recipe["name"]),
        digest=manifest.digest,
        seconds=round(seconds, 3),
        bytes_before=manifest.bytes_before,
        bytes_after=manifest.bytes_after,
        peak_rss_bytes=peak_rss_bytes(),
        figures=manifest.figures,
        layers=[row.model_dump(mode="json") for row in manifest.layers],
        unquantized=[row.model_dump(mode="json") for row in manifest.unquantized],
    )
