"""What a layer's numbers become: bits, scale groups and activation bits, as validated data."""

from __future__ import annotations

import re
from enum import Enum

from pydantic import BaseModel, ConfigDict, Field, field_validator

CHANNEL = -1  # group_size of one scale per output channel


class Head(str, Enum):
    """What the weights of a language model's output layer run as; checkpoints keep them in float."""

    FLOAT = "float"  # as the checkpoint has them; the default
    INT8 = "int8"  # one scale per token of the vocabulary
    INT4 = "int4"  # groups of 128


class Scheme(BaseModel):
    """Integer weights with one scale per channel or per group of inputs, and per-token integer activations."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight_bits: int = Field(4, ge=4, le=8, multiple_of=4)
    group_size: int = 128
    activation_bits: int = Field(8, ge=8, le=8)

    @field_validator("group_size", mode="before")
    @classmethod
    def _read_group_size(cls, value: object) -> object:
        return CHANNEL if value == "channel" else value

    @field_validator("group_size")
    @classmethod
    def _check_group_size(cls, value: int) -> int:
        if value != CHANNEL and (value < 8 or value % 8):
            raise ValueError(f"group_size must be 'channel' or a multiple of 8, not {value}")
        return value

    @property
    def name(self) -> str:
        """Return the field's usual name, such as ``W4A8-g128`` or ``W4A8-channel``."""
        group = "channel" if self.group_size == CHANNEL else f"g{self.group_size}"
        return f"W{self.weight_bits}A{self.activation_bits}-{group}"

    @classmethod
    def named(cls, name: str) -> Scheme:
        """Return the scheme whose ``name`` this is, such as ``W4A8-g128``.

        Raises:
            ValueError: it is no scheme's name.
        """
        found = re.fullmatch(r"W(\d+)A(\d+)-(?:g(\d+)|channel)", name)
        if found is None:
            raise ValueError(f"{name!r} is not the name of a scheme")
        return cls(weight_bits=int(found[1]), activation_bits=int(found[2]), group_size=int(found[3] or CHANNEL))

    def bits(self, k: int, scale_bits: int) -> float:
        """Return the stored bits a weight of an output channel with ``k`` inputs: its code and its share of scales."""
        return self.weight_bits + scale_bits * self.groups(k) / k

    @property
    def code_range(self) -> tuple[int, int]:
        """Return the smallest and largest weight code."""
        half = 1 << (self.weight_bits - 1)
        return -half, half - 1

    def groups(self, k: int) -> int:
        """Return how many scales an output channel with ``k`` inputs has."""
        return 1 if self.group_size == CHANNEL else k // self.group_size


INT8 = Scheme(weight_bits=8, group_size=CHANNEL)  # what a layer that is too sensitive for int4 becomes
