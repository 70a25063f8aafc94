"""1xN blocks: N outputs keep or lose an input channel together, and every group of outputs keeps equally many.

Storage is block-sparse rows without row pointers: N consecutive weights are one vector of a SIMD kernel.
Source of the pattern: SUBP (Zang et al. 2023) and 1xN (Lin et al. 2022).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qtoolkit.errors import CheckpointError
from qtoolkit.vision.pattern import Pattern


@dataclass(frozen=True)
class BlockWeight:
    """Values [groups, kept, taps, rows]; kept input channels of each group, int32 [groups, kept], ascending."""

    values: Tensor
    channels: Tensor
    inputs: int

    def dequantize(self) -> Tensor:
        """Return the matrix [groups * rows, taps * inputs], kernel-major."""
        groups, _kept, taps, rows = self.values.shape
        dense = self.values.new_zeros(groups, self.inputs, taps, rows)
        dense[torch.arange(groups).unsqueeze(1), self.channels.long()] = self.values
        return dense.permute(0, 3, 2, 1).reshape(groups * rows, taps * self.inputs)


class BlockPacker:
    """``weight_values``, ``weight_channels`` int32 [groups, kept], ``weight_shape`` int64 [n, taps, inputs, rows]."""

    name = "block"

    def refuse(self, n: int, k: int, scheme: Pattern) -> str | None:
        """Return why a layer cannot be stored, or None."""
        return f"{n} outputs are not a multiple of {scheme.rows}" if n % scheme.rows else None

    def read(self, matrix: Tensor, scheme: Pattern, inputs: int = 0) -> BlockWeight:
        """Return the blocks of a matrix [n, taps * inputs]; a group with fewer than the others keeps zero blocks."""
        n, k = matrix.shape
        inputs = inputs or k
        cube = matrix.view(n // scheme.rows, scheme.rows, k // inputs, inputs).permute(0, 3, 2, 1)
        used = (cube != 0).flatten(2).any(dim=2)  # [groups, inputs]
        kept = max(1, int(used.sum(dim=1).max()))
        order = (~used).to(torch.uint8).argsort(dim=1, stable=True)[:, :kept].sort(dim=1).values
        values = cube[torch.arange(len(cube)).unsqueeze(1), order]
        return BlockWeight(values.contiguous(), order.to(torch.int32), inputs)

    def pack(self, weight: BlockWeight) -> dict[str, Tensor]:
        """Return the tensors to store."""
        groups, _, taps, rows = weight.values.shape
        return {
            "weight_values": weight.values.contiguous(),
            "weight_channels": weight.channels.contiguous(),
            "weight_shape": torch.tensor([groups * rows, taps, weight.inputs, rows], dtype=torch.int64),
        }

    def unpack(self, tensors: Mapping[str, Tensor]) -> BlockWeight:
        """Return what ``pack`` was given.

        Raises:
            CheckpointError: the tensors do not belong together.
        """
        values, channels, shape = (tensors[f"weight_{part}"] for part in ("values", "channels", "shape"))
        n, taps, inputs, rows = shape.tolist() if shape.shape == (4,) else (0, 0, 0, 1)
        fits = channels.dim() == 2 and values.shape == (n // rows, channels.shape[1], taps, rows)
        fits = fits and channels.shape[0] == n // rows and n % rows == 0
        in_order = channels.shape[1] == 1 or bool((channels.diff(dim=1) > 0).all()) if fits else False
        if not fits or not in_order or int(channels.min()) < 0 or int(channels.max()) >= inputs:
            raise CheckpointError(
                f"A 1xN weight has values {list(values.shape)} and channels {list(channels.shape)} of "
                f"{shape.tolist()}, which do not belong together.",
                "The checkpoint is damaged; compress again.",
            )
        return BlockWeight(values, channels, inputs)


PACKER = BlockPacker()
