"""N:M sparsity: of every M consecutive inputs the N kept values, and where they stood in ceil(log2 M) bits each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qtoolkit.errors import CheckpointError
from qtoolkit.packing.bits import pack_bits, unpack_bits
from qtoolkit.vision.pattern import Pattern


@dataclass(frozen=True)
class SparseWeight:
    """Values [n, k / m, kept] and their places in the block, uint8 of the same shape, in ascending order."""

    values: Tensor
    places: Tensor
    size: int  # M

    def dequantize(self) -> Tensor:
        """Return the matrix [n, k]."""
        n, blocks, _ = self.values.shape
        dense = self.values.new_zeros(n, blocks, self.size)
        return dense.scatter_(2, self.places.long(), self.values).view(n, blocks * self.size)


class NMPacker:
    """``weight_values`` [n, k / m, kept], ``weight_places`` uint8 (bit-packed), ``weight_shape`` int64 [n, k, N, M]."""

    name = "nm"

    def refuse(self, n: int, k: int, scheme: Pattern) -> str | None:
        """Return why a layer cannot be stored, or None."""
        size = scheme.nm[1]
        return f"{k} inputs are not a multiple of {size}" if k % size else None

    def read(self, matrix: Tensor, scheme: Pattern, inputs: int = 0) -> SparseWeight:
        """Return what a matrix [n, k] that already has the pattern consists of; ``inputs`` plays no part.

        Raises:
            ValueError: a block has more than N nonzeros.
        """
        kept, size = scheme.nm
        blocks = matrix.view(matrix.shape[0], -1, size)
        if int((blocks != 0).sum(dim=-1).max()) > kept:
            raise ValueError(f"the matrix is not {scheme.pattern} sparse")
        # nonzeros first, zeros fill up: both in ascending order of place
        order = (blocks == 0).to(torch.uint8).argsort(dim=-1, stable=True)[..., :kept]
        places = order.sort(dim=-1).values
        return SparseWeight(blocks.gather(2, places), places.to(torch.uint8), size)

    def pack(self, weight: SparseWeight) -> dict[str, Tensor]:
        """Return the tensors to store."""
        n, blocks, kept = weight.values.shape
        return {
            "weight_values": weight.values.contiguous(),
            "weight_places": pack_bits(weight.places.flatten(), _width(weight.size)),
            "weight_shape": torch.tensor([n, blocks * weight.size, kept, weight.size], dtype=torch.int64),
        }

    def unpack(self, tensors: Mapping[str, Tensor]) -> SparseWeight:
        """Return what ``pack`` was given.

        Raises:
            CheckpointError: shapes do not belong together, or a place is outside its block or out of order.
        """
        values, packed, shape = (tensors[f"weight_{part}"] for part in ("values", "places", "shape"))
        n, k, kept, size = shape.tolist() if shape.shape == (4,) else (0, 0, 1, 1)
        width = _width(size) if size > 1 else 1
        fits = size > 1 and k % size == 0 and values.shape == (n, k // size, kept)
        if not fits or packed.shape != ((values.numel() * width + 7) // 8,):
            raise CheckpointError(
                f"An N:M weight has values {list(values.shape)}, places {list(packed.shape)} and shape "
                f"{shape.tolist()}, which do not belong together.",
                "The checkpoint is damaged; compress again.",
            )
        places = unpack_bits(packed, width, values.numel()).view(values.shape)
        if int(places.max()) >= size or (kept > 1 and not (places.int().diff(dim=-1) > 0).all()):
            raise CheckpointError("An N:M weight names places that do not exist.", "Compress again.")
        return SparseWeight(values, places, size)


def _width(size: int) -> int:
    return (size - 1).bit_length()


PACKER = NMPacker()
