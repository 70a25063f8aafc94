"""int8 in the standard compressed-tensors ``int-quantized`` layout: the codes as they are, one scale a channel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qtoolkit.errors import CheckpointError
from qtoolkit.scheme import CHANNEL, Scheme
from qtoolkit.stages import QuantizedWeight


class Int8Packer:
    """``weight`` int8 [n, k] and ``weight_scale`` [n, 1]."""

    name = "int8"

    def refuse(self, n: int, k: int, scheme: Scheme) -> str | None:
        """Return why a layer cannot be stored, or None; any n and k fit."""
        if scheme.weight_bits != 8 or scheme.group_size != CHANNEL:
            return f"int8 weights have one scale a channel, which {scheme.name} does not say"
        return None

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Return the two tensors of the layout."""
        return {"weight": weight.codes.contiguous(), "weight_scale": weight.scales.contiguous()}

    def unpack(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """Return codes and scales.

        Raises:
            CheckpointError: shapes or dtypes do not belong together.
        """
        codes, scales = tensors["weight"], tensors["weight_scale"]
        if codes.dtype != torch.int8 or codes.dim() != 2 or scales.shape != (len(codes), 1):
            raise CheckpointError(
                f"An int8 weight has {codes.dtype} codes {list(codes.shape)} and scales {list(scales.shape)}, which do "
                "not belong together.",
                "The checkpoint is damaged or was written by another tool; quantize again.",
            )
        return QuantizedWeight(codes, scales)


PACKER = Int8Packer()
