"""The nouns every method shares: block, channel group, transform, packer. Each method is rows of these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from qtoolkit.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qtoolkit.architecture import Skeleton
    from qtoolkit.source import Source
    from qtoolkit.waiting import Waiting


@dataclass(frozen=True)
class ChannelGroup:
    """One channel dimension inside a block: the modules that write it and those that read it.

    Smoothing divides the producers and multiplies the consumers, pruning deletes the same rows and columns, rotation
    multiplies both sides by an orthogonal matrix.

    Attributes:
        name: the field's name of the group, such as ``qkv``.
        producers: modules whose output channels these are (a norm, or a linear layer's rows).
        consumers: linear layers whose input channels these are.
        inside: module to run when the effect of a change is measured; empty for the consumers themselves.
        observe: module inside it whose *input* is compared; empty for the consumers' output.
        heads: the channels are attention heads' values, and several query heads read one key/value head.
        unit: consecutive channels that can only go together, such as those of an attention head.
        floats: other readers, which stay in float, such as a router: they are scaled and turned with the consumers.
    """

    name: str
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    inside: str = ""
    observe: str = ""
    heads: bool = False
    unit: int = 1
    floats: tuple[str, ...] = ()


@dataclass(frozen=True)
class QuantizedWeight:
    """The integers that will be stored: codes int8 [n, k] and scales [n, groups] in the checkpoint's dtype."""

    codes: Tensor
    scales: Tensor

    def dequantize(self, dtype: Any = None) -> Tensor:
        """Return the weight the codes stand for [n, k] in float32, or rounded to ``dtype``."""
        import torch

        from qtoolkit import nearest

        if dtype in (None, torch.float32) or dtype != self.scales.dtype:
            found = nearest.restored(self.codes, self.scales)
            return found if dtype is None else found.to(dtype)
        n, k = self.codes.shape
        groups = self.scales.shape[1]
        grouped = self.codes.to(dtype).view(n, groups, k // groups)  # codes are exact in it
        return grouped.mul_(self.scales.unsqueeze(-1)).view(n, k)

    def gap(self, weight: Tensor) -> Tensor:
        """Return what the codes stand for less ``weight`` float32 [n, k]."""
        from qtoolkit import nearest

        return nearest.restored(self.codes, self.scales, weight)

    @classmethod
    def joined(cls, parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """Return the rows of ``parts`` as one weight."""
        import torch

        if len(parts) == 1:
            return parts[0]
        return cls(torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts]))


@dataclass
class Block:
    """The unit of work, of memory and of resume: one decoder layer in float32, with what has been decided about it.

    Attributes:
        name: full name in the model, such as ``model.layers.3``.
        module: the layer itself; transforms change its weights in place.
        targets: names, inside the block, of the linear layers to quantize.
        groups: the block's channel groups.
        kv_repeats: query heads per key/value head.
        head_dim: channels of a head.
        quantized: filled by a compensating transform: codes and scales per target.
        refused: targets that stay in float, with the reason in words.
        schemes: targets that become something else than the recipe's scheme.
        residual: targets whose output is added to the hidden stream, with the norm that read it before.
        experts: name of the module whose children see a part of the tokens each; their layers are targets too.
        smoothed: what each channel group's consumers were multiplied with, and its producers divided by [k].
        metrics: how errors of a target's outputs add up in the model's loss [n, n], where that was measured.
        probe: in a block with experts what ``metrics`` are made of, once it is known which tokens an expert gets.
    """

    name: str
    module: nn.Module
    targets: tuple[str, ...]
    groups: tuple[ChannelGroup, ...]
    kv_repeats: int = 1
    head_dim: int = 0
    quantized: dict[str, QuantizedWeight] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    schemes: dict[str, Scheme] = field(default_factory=dict)
    residual: dict[str, str] = field(default_factory=dict)
    experts: str = ""
    smoothed: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)
    probe: Probe | None = None

    def layer(self, name: str) -> nn.Module:
        """Return the submodule ``name``."""
        return self.module.get_submodule(name)

    def linear(self, name: str) -> nn.Linear:
        """Return the linear layer ``name``."""
        return self.module.get_submodule(name)  # type: ignore[return-value]

    def linears(self) -> Iterator[tuple[str, nn.Linear]]:
        """Yield name and module of every target that is to be quantized."""
        for name in self.targets:
            if name not in self.refused:
                yield name, self.linear(name)


@dataclass
class Way:
    """How far a stream has come inside a block, past the parts of it (attention) that need not run again.

    Attributes:
        moves: whoever quantizes the block may bring the stream on, in its place.
        passed: parts whose outputs have been added to the stream, each with zeros of the form of its output.
        kept: parts of which all but the last layer has run, each with what that layer is given (``sections.Kept``).
        behind: the stream is behind the block.
    """

    moves: bool = False
    passed: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    behind: bool = False


@dataclass
class Stream:
    """Hidden states on their way through the blocks: batches of [sequences, tokens, hidden] and the call's keywords.

    ``floats`` are the same hidden states in the float network; where it is empty, the batches themselves are those.
    Batches that do not fit beside a block on its ``device`` wait in the host's memory, and those of a whole run on the
    disk; without a ``device`` they are where they go.
    ``way`` and ``floats_way`` say where in a block they are; as a rule before it.
    """

    batches: list[Tensor] | Waiting
    kwargs: list[dict[str, Any]]
    floats: list[Tensor] | Waiting = field(default_factory=list)
    device: Any = None  # torch.device
    way: Way = field(default_factory=Way)
    floats_way: Way = field(default_factory=Way)

    def calls(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Yield each batch, on the block's device and in float32, with its keywords."""
        return (self.call(number) for number in range(len(self.batches)))

    def call(self, number: int) -> tuple[Tensor, dict[str, Any]]:
        """Return a batch, on the block's device and in float32, with its keywords."""
        batch = self.batches[number]
        return (batch if self.device is None else batch.to(self.device)).float(), self.kwargs[number]

    def shapes(self) -> list[tuple[int, int]]:
        """Return the sequences of every batch and the tokens of each."""
        shapes = [batch.shape for batch in self.batches] if isinstance(self.batches, list) else self.batches.shapes
        return [(shape[0], shape[1]) for shape in shapes]


def put(batches: list[Tensor] | Waiting, number: int, hidden: Tensor) -> None:
    """Replace a batch where it is: memory does not fall into pieces."""
    if isinstance(batches, list):
        batches[number].copy_(hidden)
    else:
        batches[number] = hidden


@dataclass(frozen=True)
class Probe:
    """Some tokens' hidden states before a block, and the gradient of the model's loss behind it, batch by batch."""

    stream: Stream
    gradients: list[Tensor]


@dataclass(frozen=True)
class Context:
    """What a transform may use besides the block: the scheme, the stored dtype of scales, a line to the user."""

    scheme: Scheme
    scale_dtype: Any  # torch.dtype
    say: Callable[[str], None]


class Weight(Protocol):
    """What a packer stores, whatever its form: integers and scales, a sparse matrix, a product of factors."""

    def dequantize(self) -> Tensor:
        """Return the matrix [n, k] that it stands for."""
        ...


C = TypeVar("C", contravariant=True)  # Context for language models, vision's own for image classifiers
S = TypeVar("S", contravariant=True)  # Scheme, or vision's Pattern
W = TypeVar("W", bound=Weight)


class Transform(Protocol[C]):
    """Changes a block's float weights so that the float block computes what will be served.

    A class may say ``rounds``: True where it fills ``block.quantized``, False where it does not.
    """

    def apply(self, block: Block, stream: Stream, context: C) -> dict[str, dict[str, float]]:
        """Change ``block`` in place; return figures per target or group for the report."""
        ...


@runtime_checkable
class Rewrite(Protocol):
    """Changes a float model as a whole and leaves its function: a source whose tensors are read changed, one by one."""

    def rewrite(self, source: Source, skeleton: Skeleton, seed: int) -> Source:
        """Return the changed model; ``seed`` decides everything random."""
        ...


class Packer(Protocol[W, S]):
    """Pure and invertible: a method's weight to named tensors and back. ``pack(unpack(p)) == p`` bit for bit."""

    name: str

    def refuse(self, n: int, k: int, scheme: S) -> str | None:
        """Return why a layer of n outputs and k inputs cannot be packed, or None."""
        ...

    def pack(self, weight: W) -> dict[str, Tensor]:
        """Return the tensors to store, on local names."""
        ...

    def unpack(self, tensors: Mapping[str, Tensor]) -> W:
        """Return what ``pack`` was given."""
        ...
