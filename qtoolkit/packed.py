"""One quantized layer of a checkpoint: which packer stored it, and reading its integers back, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from qtoolkit import registry
from qtoolkit.errors import CheckpointError, QToolkitError
from qtoolkit.scheme import Scheme
from qtoolkit.stages import QuantizedWeight

if TYPE_CHECKING:
    from torch import Tensor

    from qtoolkit.source import Source


@runtime_checkable
class IntegerPacker(Protocol):
    """A packer of integer weights: all of ``stages.Packer``, and what its tensors are called and how large they are."""

    name: str
    parts: tuple[str, ...]

    def refuse(self, n: int, k: int, scheme: Scheme) -> str | None:
        """Return why a layer of n outputs and k inputs cannot be packed, or None."""
        ...

    def shapes(self, n: int, k: int, scheme: Scheme) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor that ``pack`` makes of such a layer."""
        ...

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Return the tensors to store, on local names."""
        ...

    def unpack(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """Return what ``pack`` was given."""
        ...


def integer_packer(name: str) -> IntegerPacker:
    """Return the packer of integer weights of that name.

    Raises:
        RequestError: there is none of that name.
        CheckpointError: it packs something else.
    """
    found = registry.packers.get(name)
    if not isinstance(found, IntegerPacker):
        raise CheckpointError(f"The packing {name!r} holds no integer weights of a language model.")
    return found


@dataclass(frozen=True)
class PackedLayer:
    """A quantized layer: its stored name, its scheme, and the name of the packer that stored it."""

    name: str
    scheme: Scheme
    packer: str

    def tensors(self, source: Source) -> dict[str, Tensor]:
        """Return the layer's tensors, on the packer's names."""
        names = {part: f"{self.name}.{part}" for part in integer_packer(self.packer).parts}
        return {part: source.read(name) for part, name in names.items() if name in source.files}

    def unpack(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """Return the codes and scales that ``tensors`` hold.

        Raises:
            CheckpointError: a tensor is missing, or they do not belong together, or not to the scheme.
            RequestError: they hold what no packer of ours does, such as zero points.
        """
        try:
            weight = integer_packer(self.packer).unpack(tensors)
        except KeyError as missing:
            raise CheckpointError(
                f"{self.name} has no tensor {missing.args[0]}.", "The folder is incomplete."
            ) from None
        except QToolkitError as error:
            raise type(error)(f"{self.name}: {error.message}", error.hint) from None
        low, high = self.scheme.code_range
        found = (int(weight.codes.min()), int(weight.codes.max())) if weight.codes.numel() else (0, 0)
        if found[0] < low or found[1] > high or weight.scales.shape[1] != self.scheme.groups(weight.codes.shape[1]):
            raise CheckpointError(
                f"{self.name} has codes {found[0]}..{found[1]} and {weight.scales.shape[1]} scales a channel of "
                f"{weight.codes.shape[1]} inputs, which is not {self.scheme.name}.",
                "The checkpoint is damaged or was written by another tool.",
            )
        return weight
