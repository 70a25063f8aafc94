"""Filter pruning: the filters that are left, restricted to the input channels that are left, and two index lists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qtoolkit.errors import CheckpointError
from qtoolkit.vision.pattern import Pattern


@dataclass(frozen=True)
class FilterWeight:
    """Values [kept rows, taps, kept channels]; kept rows of n and kept input channels of the dense matrix's."""

    values: Tensor
    rows: Tensor  # int32, ascending
    channels: Tensor  # int32, ascending
    n: int
    inputs: int

    def dequantize(self) -> Tensor:
        """Return the matrix [n, taps * inputs], kernel-major."""
        taps = self.values.shape[1]
        dense = self.values.new_zeros(self.n, taps, self.inputs)
        dense[self.rows.long().view(-1, 1, 1), torch.arange(taps).view(1, -1, 1), self.channels.long()] = self.values
        return dense.flatten(1)


class FilterPacker:
    """``weight_values``, ``weight_rows``, ``weight_channels`` int32, ``weight_shape`` int64 [n, taps, inputs]."""

    name = "filter"

    def refuse(self, n: int, k: int, scheme: Pattern) -> str | None:
        """Return None: every layer can be stored."""
        return None

    def read(self, matrix: Tensor, scheme: Pattern, inputs: int = 0) -> FilterWeight:
        """Return what is left of a matrix [n, taps * inputs] without its zero rows and its zero input channels.

        A matrix of zeros keeps its first row and channel, so that there is something to compute.
        """
        n, k = matrix.shape
        inputs = inputs or k
        cube = matrix.view(n, k // inputs, inputs)
        rows = _kept((cube != 0).flatten(1).any(dim=1))
        channels = _kept((cube != 0).flatten(0, 1).any(dim=0))
        values = cube[rows.long()][:, :, channels.long()]
        return FilterWeight(values, rows, channels, n, inputs)

    def pack(self, weight: FilterWeight) -> dict[str, Tensor]:
        """Return the tensors to store."""
        return {
            "weight_values": weight.values.contiguous(),
            "weight_rows": weight.rows,
            "weight_channels": weight.channels,
            "weight_shape": torch.tensor([weight.n, weight.values.shape[1], weight.inputs], dtype=torch.int64),
        }

    def unpack(self, tensors: Mapping[str, Tensor]) -> FilterWeight:
        """Return what ``pack`` was given.

        Raises:
            CheckpointError: the tensors do not belong together.
        """
        values, rows, channels, shape = (tensors[f"weight_{p}"] for p in ("values", "rows", "channels", "shape"))
        n, taps, inputs = shape.tolist() if shape.shape == (3,) else (0, 0, 0)
        fits = values.shape == (len(rows), taps, len(channels)) and _ascending(rows, n) and _ascending(channels, inputs)
        if not fits:
            raise CheckpointError(
                f"A filter-pruned weight has values {list(values.shape)}, {len(rows)} rows and {len(channels)} "
                f"channels of {shape.tolist()}, which do not belong together.",
                "The checkpoint is damaged; compress again.",
            )
        return FilterWeight(values, rows, channels, n, inputs)


def _kept(used: Tensor) -> Tensor:
    found = used.nonzero().flatten().to(torch.int32)
    return found if len(found) else torch.zeros(1, dtype=torch.int32)


def _ascending(index: Tensor, end: int) -> bool:
    return bool(len(index) and int(index[0]) >= 0 and int(index[-1]) < end and (index.diff() > 0).all())


PACKER = FilterPacker()
