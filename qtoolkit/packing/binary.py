"""Binary weights: one bit a weight in 64-bit words, 1 for +1, and one scale an output channel.

Where the sign of a batch norm follows, nothing but an integer threshold a channel is left of scale, bias and norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from qtoolkit.errors import CheckpointError
from qtoolkit.vision.pattern import Pattern

WORD = 64


@dataclass(frozen=True)
class BinaryWeight:
    """Signs int8 [n, k], each -1 or +1, and scales float32 [n].

    With ``thresholds`` int32 [n] the layer's output is a sign: +1 where the sum of products is at least the threshold.
    """

    signs: Tensor
    scales: Tensor
    thresholds: Tensor | None = None

    def dequantize(self) -> Tensor:
        """Return the matrix [n, k] of scaled signs."""
        return self.signs.to(self.scales.dtype) * self.scales.unsqueeze(1)


class BinaryPacker:
    """``weight_words`` int64 [n, ceil(k / 64)] lowest bit first, ``weight_scale`` [n], ``weight_shape`` int64 [2],
    and ``weight_thresholds`` int32 [n] where a norm and a sign are folded in.

    The bits after the last input are 0. Padding of a convolution is no weight: the layer that runs them leaves
    padded taps out of the sum.
    """

    name = "binary"

    def refuse(self, n: int, k: int, scheme: Pattern) -> str | None:
        """Return None: every layer can be stored."""
        return None

    def pack(self, weight: BinaryWeight) -> dict[str, Tensor]:
        """Return the tensors to store."""
        n, k = weight.signs.shape
        bits = F.pad((weight.signs > 0).long(), (0, -k % WORD)).view(n, -1, WORD)
        words = (bits << torch.arange(WORD)).sum(dim=-1)  # bit 63 makes the int64 negative: the same 64 bits
        shape = torch.tensor([n, k], dtype=torch.int64)
        tensors = {"weight_words": words, "weight_scale": weight.scales.contiguous(), "weight_shape": shape}
        if weight.thresholds is not None:
            tensors["weight_thresholds"] = weight.thresholds.contiguous()
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor]) -> BinaryWeight:
        """Return what ``pack`` was given.

        Raises:
            CheckpointError: the tensors do not belong together.
        """
        words, scales, shape = (tensors[f"weight_{part}"] for part in ("words", "scale", "shape"))
        n, k = shape.tolist() if shape.shape == (2,) else (0, 0)
        if words.dtype != torch.int64 or words.shape != (n, -(-k // WORD)) or scales.shape != (n,):
            raise CheckpointError(
                f"A binary weight of shape {shape.tolist()} has words {list(words.shape)} and scales "
                f"{list(scales.shape)}, which do not belong together.",
                "The checkpoint is damaged; compress again.",
            )
        thresholds = tensors.get("weight_thresholds")
        if thresholds is not None and (thresholds.dtype != torch.int32 or thresholds.shape != (n,)):
            raise CheckpointError(
                f"The thresholds of a binary weight of {n} outputs are {thresholds.dtype} {list(thresholds.shape)}.",
                "The checkpoint is damaged; compress again.",
            )
        bits = (words.unsqueeze(-1) >> torch.arange(WORD)) & 1  # [n, words, 64]
        return BinaryWeight((bits.flatten(1)[:, :k] * 2 - 1).to(torch.int8), scales, thresholds)


PACKER = BinaryPacker()
