"""int4 in the standard compressed-tensors ``pack-quantized`` layout: eight codes a word, low nibble first, +8."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from qtoolkit.errors import CheckpointError
from qtoolkit.scheme import CHANNEL, Scheme
from qtoolkit.stages import QuantizedWeight

OFFSET = 8  # codes -8..7 are stored as 0..15
AT_ONCE = 1 << 20  # codes that are held as int32 at once


def pack_int4(codes: Tensor) -> Tensor:
    """Pack int8 codes [n, k] in -8..7 into int32 [n, ceil(k / 8)]; missing codes of the last word are zeros.

    Raises:
        ValueError: a code lies outside -8..7.
    """
    if codes.numel() and (int(codes.min()) < -8 or int(codes.max()) > 7):
        raise ValueError(f"int4 codes must lie in -8..7, got {int(codes.min())}..{int(codes.max())}")
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=codes.device)
    found = []
    for some in codes.split(max(1, AT_ONCE // max(1, codes.shape[1]))):
        nibbles = (F.pad(some.to(torch.int32), (0, -codes.shape[1] % 8)) + OFFSET).unflatten(1, (-1, 8))
        found.append((nibbles << shifts).sum(dim=-1, dtype=torch.int32))  # of [rows, words, 8]
    return torch.cat(found)


def unpack_int4(packed: Tensor, k: int) -> Tensor:
    """Return the int8 codes [n, k] that ``pack_int4`` was given."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    nibbles = (packed.unsqueeze(-1) >> shifts) & 0xF  # [n, words, 8]
    return (nibbles.flatten(1)[:, :k] - OFFSET).to(torch.int8)


class Int4Packer:
    """``weight_packed`` int32 [n, ceil(k/8)], ``weight_scale`` [n, groups], ``weight_shape`` int64 [2]."""

    name = "int4"
    parts = ("weight_packed", "weight_scale", "weight_shape")

    def refuse(self, n: int, k: int, scheme: Scheme) -> str | None:
        """Return why a layer cannot be stored, or None; any n and k fit when the group divides k."""
        if scheme.weight_bits != 4:
            return f"{scheme.name} has {scheme.weight_bits}-bit weights, and this layout holds four bits"
        if scheme.group_size != CHANNEL and k % scheme.group_size:
            return f"{k} inputs are not a multiple of the group size {scheme.group_size}"
        return None

    def shapes(self, n: int, k: int, scheme: Scheme) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of a layer."""
        return {"weight_packed": (n, (k + 7) // 8), "weight_scale": (n, scheme.groups(k)), "weight_shape": (2,)}

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Return the three tensors of the layout."""
        return {
            "weight_packed": pack_int4(weight.codes),
            "weight_scale": weight.scales.contiguous(),
            "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64, device=weight.codes.device),
        }

    def unpack(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """Return codes and scales.

        Raises:
            CheckpointError: shapes or dtypes do not belong together.
        """
        packed, scales, shape = (tensors[name] for name in ("weight_packed", "weight_scale", "weight_shape"))
        n, k = shape.tolist() if shape.shape == (2,) else (0, 1)
        fits = packed.dtype == torch.int32 and packed.shape == (n, (k + 7) // 8)
        if not fits or scales.dim() != 2 or scales.shape[0] != n or scales.shape[1] < 1 or k % scales.shape[1]:
            raise CheckpointError(
                f"A packed weight of shape [{n}, {k}] has {packed.dtype} codes {list(packed.shape)} and "
                f"scales {list(scales.shape)}, which do not belong together.",
                "The checkpoint is damaged or was written by another tool; quantize again.",
            )
        return QuantizedWeight(unpack_int4(packed, k), scales)


PACKER = Int4Packer()
