"""Deformable butterflies: the chain of factor shapes and all their numbers in one flat tensor."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qtoolkit.errors import CheckpointError
from qtoolkit.vision import butterfly
from qtoolkit.vision.butterfly import Chain, Factor
from qtoolkit.vision.pattern import Pattern


@dataclass(frozen=True)
class ButterflyWeight:
    """A chain and the numbers of its factors, flat [nonzeros], from the input's side on."""

    chain: Chain
    flat: Tensor

    def dequantize(self) -> Tensor:
        """Return the product as a matrix [n, k]."""
        return butterfly.dense(self.chain, butterfly.split(self.flat, self.chain))


class DebutPacker:
    """``weight_factors`` [nonzeros], ``weight_chain`` int32 [factors, 5] with rows p, q, r, s, t."""

    name = "debut"

    def refuse(self, n: int, k: int, scheme: Pattern) -> str | None:
        """Return None: whether a chain exists is the search's business."""
        return None

    def pack(self, weight: ButterflyWeight) -> dict[str, Tensor]:
        """Return the tensors to store."""
        rows = [[f.p, f.q, f.r, f.s, f.t] for f in weight.chain]
        return {"weight_factors": weight.flat.contiguous(), "weight_chain": torch.tensor(rows, dtype=torch.int32)}

    def unpack(self, tensors: Mapping[str, Tensor]) -> ButterflyWeight:
        """Return what ``pack`` was given.

        Raises:
            CheckpointError: the chain is not one, or the numbers are not as many as it needs.
        """
        flat, table = tensors["weight_factors"], tensors["weight_chain"]
        try:
            chain = tuple(Factor(*row) for row in table.tolist())
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"A butterfly's chain is damaged: {error}.", "Compress again.") from None
        joined = all(left.p == right.q for left, right in itertools.pairwise(chain))
        if not chain or not joined or flat.shape != (butterfly.nonzeros(chain),):
            raise CheckpointError(
                f"A butterfly has {flat.numel()} numbers and the chain {table.tolist()}, which do not belong together.",
                "The checkpoint is damaged; compress again.",
            )
        return ButterflyWeight(chain, flat)


PACKER = DebutPacker()
