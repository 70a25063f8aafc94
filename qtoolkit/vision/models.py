"""Image classifiers by name or folder: our own definitions with their weights, and transformers' classifiers."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import torch
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from qtoolkit.errors import ModelError, NumericError, RequestError
from qtoolkit.recipe import explain
from qtoolkit.registry import suggest
from qtoolkit.source import resolve as find
from qtoolkit.stages import Block, ChannelGroup
from qtoolkit.vision import dependencies
from qtoolkit.vision.networks import seeded

TRANSFORMERS = "transformers"  # stands in a manifest for the architecture that the folder's config.json describes
LAYERS = (nn.Conv2d, nn.Linear)  # what can be compressed; depthwise and grouped convolutions stay


class Augment(BaseModel):
    """How training images are varied: random shifts by up to ``crop`` pixels, and mirroring."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    crop: int = 0
    flip: bool = False


class Fit(BaseModel):
    """How an image of any size becomes one of the network's: scaled, then the middle is cut out.

    Scaled so that its shorter side is ``shortest``, or to ``squeeze`` (height, width) whatever its shape; by default
    to the network's own size.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    shortest: int = 0
    squeeze: tuple[int, int] | None = None
    resample: str = "bilinear"  # a name of PIL's Resampling


class Architecture(BaseModel):
    """One file of ``architectures/``: how a network is built, what its images look like, its channel groups."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    about: str
    builder: str
    arguments: dict[str, int] = {}
    input: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: Fit = Fit()
    augment: Augment = Augment()
    labels: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    blocks: str = ""
    groups: tuple[ChannelGroup, ...] = ()
    dropped: tuple[str, ...] = ()
    folds: dict[str, str] = {}  # a layer and the norm whose sign alone is read: both become a threshold if binary
    weights_of: str = ""  # the network whose trained weights fit by name, though this one answers otherwise with them

    def short(self, seed: int = 0) -> nn.Module:
        """Return the network with random weights and without the blocks that are left out."""
        network = self.build(seed)
        for name in self.dropped:
            network.set_submodule(name, nn.Identity())
        return network

    def build(self, seed: int = 0) -> nn.Module:
        """Return the whole network with random weights."""
        module, _, attr = self.builder.partition(":")
        return seeded(seed, getattr(import_module(module), attr), **self.arguments)


@dataclass(frozen=True)
class Model:
    """A float network ready to be compressed, with what is known about it, and the folder it came from if any.

    ``original`` makes the trained network anew, with which accuracy is compared; None if the weights are random.
    """

    name: str
    network: nn.Module
    architecture: Architecture
    original: Callable[[], nn.Module] | None
    folder: Path | None = None

    def block(self, kind: str = "") -> Block:
        """Return the whole network as one unit of work: it is small, and training needs all of it.

        For pattern ``filter`` a transformers network's channel groups are traced, and its targets are their layers.
        """
        block = Block("", self.network, (), tuple(channel_groups(self.network, self.architecture)))
        if kind == "filter" and self.folder is not None:
            traced = dependencies.trace(self.network, self.architecture.input)
            block.groups = traced.groups
            block.refused.update(traced.refused)
        grouped = {name for group in block.groups for name in (*group.producers, *group.consumers)}
        found = [name for name, _ in compressible(self.network)]
        block.targets = tuple(name for name in found if name in grouped or name not in self.architecture.keep)
        block.refused = {name: reason for name, reason in block.refused.items() if name not in grouped}
        return block

    def untouched(self) -> dict[str, str]:
        """Return the layers that no recipe may pack, with the reason."""
        every = [name for name, module in self.network.named_modules() if isinstance(module, LAYERS)]
        able = {name for name, _ in compressible(self.network)}
        return {
            name: "the architecture keeps it" if name in able else "a grouped convolution"
            for name in every
            if name not in able or name in self.architecture.keep
        }

    def digest(self) -> str:
        """Return 12 hex digits of the name and every weight."""
        state = hashlib.sha256(self.name.encode())
        for name, tensor in sorted(self.network.state_dict().items()):
            state.update(name.encode() + tensor.detach().numpy().tobytes())
        return state.hexdigest()[:12]

    @property
    def bytes(self) -> int:
        """Return the size of the network's tensors in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.network.state_dict().values())


@cache
def table() -> dict[str, Architecture]:
    """Return every shipped architecture."""
    found = {}
    for entry in sorted((files("qtoolkit.vision") / "architectures").iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".yaml"):
            try:
                row = Architecture.model_validate(yaml.safe_load(entry.read_text("utf-8")))
            except ValidationError as error:
                raise explain(error, Architecture, f"architecture file {entry.name}") from None
            found[entry.name.removesuffix(".yaml")] = row
    return found


def resolve(name: str, weights: str | Path | None = None, seed: int = 0) -> Model:
    """Build one of our own networks, or load a transformers image classifier from a folder or the hub.

    An own network is given ``weights``: an ``.npz`` or ``.safetensors`` file, one array a tensor. Without, it starts
    from random ones and only recipes that train make sense.

    Raises:
        RequestError: no such network or file, or weights for a model that has its own.
        ModelError: the weights do not belong to the network, or the folder holds no image classifier.
        NumericError: a weight is NaN or Inf.
    """
    if name not in table() and (Path(name).expanduser().is_dir() or name.count("/") == 1):
        from qtoolkit.vision import classifiers

        if weights is not None:
            raise RequestError(f"{name} brings its own weights.", "Leave --weights out.")
        return classifiers.resolve(find(name))
    if name not in table():
        raise RequestError(f"There is no vision model named {name!r}.", suggest(name, table()))
    architecture = table()[name]
    network = architecture.build(seed).eval()
    if weights is not None:
        load_state(network, read_weights(Path(weights).expanduser()), f"{weights}")
    own = architecture.weights_of or name
    original = (lambda: resolve(own, weights).network) if weights is not None else None
    return Model(name, network, architecture, original)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a ``.npz`` or ``.safetensors`` file; nothing in it is executed.

    Raises:
        RequestError: no such file, or another kind of file.
        ModelError: the file is damaged.
    """
    if not path.is_file():
        raise RequestError(f"There is no weight file {path}.")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ModelError(f"The weight file {path} is damaged: {' '.join(str(error).split())}.") from None
    if path.suffix != ".npz":
        raise RequestError(f"{path} is neither .npz nor .safetensors.", "Pickled weights can run code: convert them.")
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ModelError(f"The weight file {path} is damaged: {' '.join(str(error).split())}.") from None


def load_state(network: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Load ``state`` into ``network``; every tensor must be there, fit and be finite.

    Raises:
        ModelError: a tensor is missing, unknown or of another shape.
        NumericError: a tensor holds NaN or Inf.
    """
    wanted = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    for name, tensor in wanted.items():
        if name not in state:
            raise ModelError(f"{origin} has no tensor {name}.", "Are these the weights of this network?")
        if state[name].shape != tensor.shape:
            found, expected = list(state[name].shape), list(tensor.shape)
            raise ModelError(f"{origin}: {name} has shape {found}, the network has {expected}.")
        if not state[name].isfinite().all():
            raise NumericError(f"{origin}: {name} holds NaN or Inf.", "The weights are damaged.")
    unknown = sorted(name for name in state if name not in network.state_dict())
    if unknown:
        raise ModelError(f"{origin} has a tensor {unknown[0]} that the network does not have.")
    network.load_state_dict({name: state[name] for name in wanted}, strict=False)


def compressible(network: nn.Module) -> list[tuple[str, nn.Conv2d | nn.Linear]]:
    """Return name and module of every convolution and linear layer, in order; grouped convolutions are left out."""
    return [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, LAYERS) and getattr(module, "groups", 1) == 1
    ]


def channel_groups(network: nn.Module, architecture: Architecture) -> list[ChannelGroup]:
    """Return the architecture's groups with full module names, one for every block that matches."""
    names = [""]
    if architecture.blocks:
        names = [name for name, m in network.named_modules() if name and not isinstance(m, nn.Identity)]
    found = []
    for block in names:
        if not architecture.blocks or (
            fnmatch.fnmatchcase(block, architecture.blocks) and block.count(".") == architecture.blocks.count(".")
        ):
            prefix = f"{block}." if block else ""
            found += [
                ChannelGroup(
                    prefix + group.name,
                    tuple(prefix + name for name in group.producers),
                    tuple(prefix + name for name in group.consumers),
                )
                for group in architecture.groups
            ]
    return found
