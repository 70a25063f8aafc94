"""What a foreign ``quantization_config`` means in our words: layers, schemes and packers, or a sentence why not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qtoolkit.errors import CheckpointError, RequestError
from qtoolkit.packed import PackedLayer
from qtoolkit.scheme import CHANNEL, Scheme

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
Tensors = dict[str, "Tensor"]
SYMMETRIC = "Only symmetric 4-bit weights (and 8-bit ones with a scale a channel) can be converted."


@dataclass(frozen=True)
class Described:
    """A checkpoint's quantized layers.

    Attributes:
        layout: what the files call their layout, for people.
        layers: each with the packer of ours that reads it.
        declared: the files say that inputs become int8.
        neutral: turns a layer's stored tensors into those that the packer reads, where the files speak a dialect.
    """

    layout: str
    layers: tuple[PackedLayer, ...]
    declared: bool
    neutral: Callable[[Tensors], Tensors] = dict


def named(shapes: Shapes, part: str) -> list[str]:
    """Return the layers that have a tensor ``part``.

    Raises:
        CheckpointError: there is none.
    """
    found = [name.removesuffix(f".{part}") for name in shapes if name.endswith(f".{part}")]
    if not found:
        raise CheckpointError(
            f"The config speaks of quantized layers, but no tensor is called *.{part}.",
            "The folder is incomplete, or its weights are stored in float.",
        )
    return found


def group_size(config: Mapping[str, Any], *keys: str) -> int:
    """Return the group size that the first of ``keys`` gives.

    Raises:
        RequestError: it is none that a scheme can have.
    """
    value = next((config[key] for key in keys if config.get(key) is not None), CHANNEL)
    try:
        return Scheme(group_size=int(value)).group_size
    except (TypeError, ValueError):
        raise RequestError(f"Its group size is {value!r}.", "Groups of a multiple of 8 can be converted.") from None


def int4_bits(config: Mapping[str, Any], *keys: str) -> None:
    """Refuse any other number of bits than four.

    Raises:
        RequestError: another number.
    """
    bits = next((config[key] for key in keys if key in config), None)
    if bits != 4:
        raise RequestError(f"Its weights have {bits} bits.", SYMMETRIC)
