"""Codes as they are, a byte each: the standard compressed-tensors ``int-quantized`` layout, for int8 and for int4."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qtoolkit.errors import CheckpointError
from qtoolkit.scheme import CHANNEL, Scheme
from qtoolkit.stages import QuantizedWeight


class Int8Packer:
    """``weight`` int8 [n, k] and ``weight_scale`` [n, groups]; int8 weights have one scale a channel."""

    name = "int8"
    parts = ("weight", "weight_scale")

    def refuse(self, n: int, k: int, scheme: Scheme) -> str | None:
        """Return why a layer cannot be stored, or None; any n and k fit when the group divides k."""
        if scheme.weight_bits == 8 and scheme.group_size != CHANNEL:
            return f"int8 weights have one scale a channel, which {scheme.name} does not say"
        if scheme.group_size != CHANNEL and k % scheme.group_size:
            return f"{k} inputs are not a multiple of the group size {scheme.group_size}"
        return None

    def shapes(self, n: int, k: int, scheme: Scheme) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of a layer."""
        return {"weight": (n, k), "weight_scale": (n, scheme.groups(k))}

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Return the two tensors of the layout."""
        return {"weight": weight.codes.contiguous(), "weight_scale": weight.scales.contiguous()}

    def unpack(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """Return codes and scales.

        Raises:
            CheckpointError: shapes or dtypes do not belong together.
        """
        codes, scales = tensors["weight"], tensors["weight_scale"]
        fits = codes.dtype == torch.int8 and codes.dim() == scales.dim() == 2 and len(codes) == len(scales)
        if not fits or scales.shape[1] < 1 or codes.shape[1] % scales.shape[1]:
            raise CheckpointError(
                f"An int8 weight has {codes.dtype} codes {list(codes.shape)} and scales {list(scales.shape)}, which do "
                "not belong together.",
                "The checkpoint is damaged or was written by another tool; quantize again.",
            )
        return QuantizedWeight(codes, scales)


PACKER = Int8Packer()
