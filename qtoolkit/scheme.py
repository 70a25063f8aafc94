"""What a layer's numbers become: bits, scale groups and activation bits, as validated data."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, field_validator

CHANNEL = -1  # group_size of one scale per output channel


class Scheme(BaseModel):
    """Integer weights with one scale per channel or per group of inputs, and per-token integer activations."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight_bits: int = Field(4, ge=4, le=4)
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

    @property
    def code_range(self) -> tuple[int, int]:
        """Return the smallest and largest weight code."""
        half = 1 << (self.weight_bits - 1)
        return -half, half - 1

    def groups(self, k: int) -> int:
        """Return how many scales an output channel with ``k`` inputs has."""
        return 1 if self.group_size == CHANNEL else k // self.group_size
