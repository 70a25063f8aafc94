"""Running a compressed classifier: the network with its layers replaced by those that the packed tensors make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from qtoolkit import checkpoint
from qtoolkit.errors import CheckpointError
from qtoolkit.source import Source
from qtoolkit.vision import accelerated, layers, models
from qtoolkit.vision.data import normalise, to_pixels
from qtoolkit.vision.matrix import Layer
from qtoolkit.vision.models import TRANSFORMERS, Architecture
from qtoolkit.vision.narrow import narrow
from qtoolkit.vision.record import VisionManifest

DENSE = "torch"  # the name of what is no kernel of ours
FACTS = ("kernel_size", "stride", "padding", "dilation")


@dataclass(frozen=True)
class Runs:
    """What runs a packed layer on this machine: a kernel's name, or torch and why no kernel does."""

    name: str
    reason: str = ""


@dataclass(frozen=True)
class Loaded:
    """A network in evaluation mode, how its images are prepared, what the checkpoint says, what runs each layer."""

    network: nn.Module
    architecture: Architecture
    manifest: VisionManifest
    kernels: Mapping[str, Runs]

    @torch.inference_mode()
    def classify(self, *images: Any, top: int = 5) -> list[list[tuple[str, float]]]:
        """Return, for every image file or PIL image, the likeliest labels with their probabilities.

        Raises:
            DataError: something is not an image.
        """
        x = torch.stack([to_pixels(image, self.architecture) for image in images])
        found = self.network(normalise(x, self.architecture)).softmax(dim=1)
        best = found.topk(min(top, found.shape[1]), dim=1)
        names = self.architecture.labels or tuple(map(str, range(found.shape[1])))
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [[(names[index], value) for index, value in zip(*row, strict=True)] for row in rows]

    def made_from(self, reference: str) -> nn.Module:
        """Return the float network: ``reference`` is its folder or hub name, or an own network's weight file.

        Raises:
            QToolkitError: there is no such thing, or it belongs to another network.
        """
        named = self.manifest.architecture
        model = models.resolve(reference) if named == TRANSFORMERS else models.resolve(named, reference)
        return model.original() if model.original is not None else model.network


@torch.inference_mode()
def load(path: str | Path) -> Loaded:
    """Load a folder that ``qtoolkit compress`` wrote.

    Raises:
        RequestError: no such folder.
        CheckpointError: it is damaged, or holds a language model.
    """
    folder = Path(path).expanduser()
    manifest = checkpoint.verify(folder)
    if not isinstance(manifest, VisionManifest):
        raise CheckpointError(f"{folder} holds a language model, not an image classifier.")
    source = Source(folder, str(folder))
    tensors = {name: source.read(name) for name in source.files}
    architecture = _architecture(source, manifest)
    names = [layer.name for layer in manifest.layers]
    network, kernels = assemble(architecture, tensors, names, manifest.scheme.kind)
    return Loaded(network, architecture, manifest, kernels)


def _architecture(source: Source, manifest: VisionManifest) -> Architecture:
    """Return what builds the network; nothing of the folder names code."""
    if manifest.architecture == TRANSFORMERS:
        from qtoolkit.vision import classifiers

        described = {"groups": manifest.channel_groups, "dropped": manifest.dropped}
        return classifiers.read(source).model_copy(update=described)
    found = models.table().get(manifest.architecture)
    if found is None:
        raise CheckpointError(
            f"{source.name} needs the architecture {manifest.architecture!r}, which is not known here."
        )
    return found.model_copy(update={"dropped": manifest.dropped})


def assemble(
    architecture: Architecture, tensors: Mapping[str, Tensor], packed: Iterable[str], kind: str
) -> tuple[nn.Module, dict[str, Runs]]:
    """Return the network of ``architecture`` with float ``tensors`` and ``packed`` layers, and what runs the latter.

    Where filters were removed, the layers of the architecture's channel groups become narrower.

    Raises:
        CheckpointError: a tensor is missing or of another shape.
    """
    network = architecture.short()
    names = set(packed)
    runs: dict[str, Runs] = {}
    for name, norm in architecture.folds.items():  # of these nothing but thresholds is stored
        if f"{name}.weight_thresholds" in tensors:
            network.set_submodule(norm, nn.Identity())
    wanted = {
        name: tensor
        for name, tensor in network.state_dict().items()
        if name.rpartition(".")[0] not in names or name.endswith(".bias")
    }
    for name, tensor in wanted.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise CheckpointError(f"The checkpoint has no tensor {name} of shape {list(tensor.shape)}.")
    network.load_state_dict({name: tensors[name] for name in wanted}, strict=False)
    for name in sorted(names):
        prefix = f"{name}."
        parts = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(f"{prefix}weight_")}
        like = network.get_submodule(name)
        try:
            fast = accelerated.build(kind, parts, cast(Layer, like))
            made = layers.build(kind, parts, cast(Layer, like)) if isinstance(fast, str) else fast
            runs[name] = Runs(DENSE, fast) if isinstance(fast, str) else Runs(fast.kernel)
        except KeyError as error:
            raise CheckpointError(f"The checkpoint has no tensor {name}.{error.args[0]}.") from None
        for fact in FACTS:  # some networks ask their layers, MobileNetV2 for its padding
            if hasattr(like, fact) and not hasattr(made, fact):
                setattr(made, fact, getattr(like, fact))
        network.set_submodule(name, made)
    if kind == "filter":
        narrow(network, models.channel_groups(network, architecture))
    return network.eval().requires_grad_(False), runs
