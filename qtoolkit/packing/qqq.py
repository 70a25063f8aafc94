"""int4 in the layout of the original QQQ files, tiles in the order of its GPU kernel: closed-form maps, both ways.

Sources: github.com/HandH1998/QQQ (``QuantLinear``); the index map was checked against its permutation tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from qtoolkit.errors import CheckpointError
from qtoolkit.packing.int4 import pack_int4, unpack_int4
from qtoolkit.scheme import CHANNEL, Scheme
from qtoolkit.stages import QuantizedWeight

GROUP = 128  # the only group size the layout has besides one scale per channel
TILE_K, TILE_N = 16, 64  # codes move only inside tiles of 16 inputs and 64 outputs: slices along them stay valid
CHANNEL_FACTOR = 16.0  # the kernel reads a channel's code from the high nibble, as 16 * q, so files store scale / 16


@lru_cache(maxsize=2)
def _tile(grouped: bool) -> Tensor:
    """Return where each code of a tile [64, 16] (output, input) lies among the 1024 nibbles of the tile's words."""
    n, k = torch.arange(TILE_N).unsqueeze(1), torch.arange(TILE_K)
    t, b = k % 4, n % 16 // 8
    word = 16 * (n % 8) + 4 * (k // 4) + n // 16
    nibble = 4 * (t % 2) + 2 * b + t // 2 if grouped else 2 * t + 1 - b
    return word * 8 + nibble  # [64, 16]


def _channel_columns(n: int) -> Tensor:
    """Return where ``s_channel`` stores each output's scale: permuted inside blocks of 32."""
    c = torch.arange(n)
    return c // 32 * 32 + 8 * (c % 8 // 2) + 2 * (c % 32 // 8) + c % 2


def _group_columns(n: int) -> Tensor:
    """Return where ``s_group`` stores each output's scale: permuted inside blocks of 64."""
    c = torch.arange(n)
    return c // 64 * 64 + 8 * (c % 8) + c % 64 // 8


def pack_codes(codes: Tensor, grouped: bool) -> Tensor:
    """Pack int8 codes [n, k] into ``B``, int32 [k/16, 2n]; k must be a multiple of 16 and n of 64.

    A nibble is the code + 8 in grouped files and the code's two's complement in per-channel ones.
    """
    n, k = codes.shape
    tiles = codes.view(n // TILE_N, TILE_N, k // TILE_K, TILE_K).permute(2, 0, 1, 3).flatten(2)  # [k/16, n/64, 1024]
    order = _tile(grouped).flatten().argsort()  # nibble -> code
    nibbles = tiles[:, :, order].flatten(1)  # [k/16, 16n]
    return pack_int4(nibbles if grouped else _flip(nibbles))


def unpack_codes(packed: Tensor, grouped: bool) -> Tensor:
    """Return the int8 codes [n, k] stored in ``B``, int32 [k/16, 2n]."""
    rows, words = packed.shape
    nibbles = unpack_int4(packed, words * 8)  # [k/16, 16n]
    tiles = (nibbles if grouped else _flip(nibbles)).view(rows, -1, TILE_N * TILE_K)
    codes = tiles[:, :, _tile(grouped).flatten()].view(rows, -1, TILE_N, TILE_K)  # [k/16, n/64, 64, 16]
    return codes.permute(1, 2, 0, 3).reshape(words // 2, rows * TILE_K)


def _flip(codes: Tensor) -> Tensor:
    """Exchange offset-8 and two's complement: the nibbles differ in their top bit. Its own inverse."""
    return codes ^ -8


def scales(s_channel: Tensor, s_group: Tensor | None) -> Tensor:
    """Return plain scales, float32 [n, groups], of a file's ``s_channel`` [1, n] and ``s_group`` [groups, n] or None.

    A grouped file holds a scale per channel, made for int8 weights, and float16 group scales on top of it. The
    original kernel rounds ``code * s_group`` to int8 before it multiplies with ``s_channel``. The plain product of
    the three, which these scales stand for, is what the quantizer meant: it lacks that second rounding, which adds
    noise of about s_channel / sqrt(12) to a weight.
    """
    n = s_channel.shape[1]
    channel = s_channel.float()[0, _channel_columns(n)]  # [n]
    if s_group is None or s_group.numel() == 0:
        return (channel * CHANNEL_FACTOR).unsqueeze(1)
    return s_group.float()[:, _group_columns(n)].t() * channel.unsqueeze(1)


def split_scales(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Return ``s_channel`` [1, n] float32 and ``s_group`` [groups, n] float16 whose product is the plain scales.

    The channel scale is the smallest power of two for which every ``code * s_group`` fits int8. A power of two keeps
    float16 and bfloat16 scales exact; the original quantizer takes largest weight / 127, which does not.
    """
    n, groups = weight.scales.shape
    plain = weight.scales.float()
    peak = weight.codes.view(n, groups, -1).to(torch.int16).abs().amax(dim=-1)  # [n, groups], up to 8
    largest = (plain * peak).amax(dim=1)
    exponent = torch.where(largest > 0, (largest / 127.0).log2().ceil(), 0.0)
    s_channel, s_group = torch.empty(1, n), torch.empty(groups, n, dtype=torch.float16)
    s_channel[0, _channel_columns(n)] = exponent.exp2()
    s_group[:, _group_columns(n)] = (plain / exponent.exp2().unsqueeze(1)).t().half()
    return s_channel, s_group


class QQQPacker:
    """``B`` int32 [k/16, 2n], ``s_channel`` float32 [1, n] and, with groups of 128, ``s_group`` float16 [k/128, n]."""

    name = "qqq"
    parts = ("B", "s_channel", "s_group")

    def refuse(self, n: int, k: int, scheme: Scheme) -> str | None:
        """Return why the original kernel could not run a layer, or None."""
        if scheme.weight_bits != 4:
            return f"{scheme.name} has {scheme.weight_bits}-bit weights, and this layout holds four bits"
        if scheme.group_size not in (CHANNEL, GROUP):
            return (
                f"the QQQ layout knows groups of {GROUP} and one scale per channel, not groups of {scheme.group_size}"
            )
        if not any(k % tile_k == 0 and n % tile_n == 0 for tile_k, tile_n in ((64, 128), (128, 64))):
            return f"{n} outputs and {k} inputs are not multiples of 64 and 128, in either order"
        if scheme.group_size == GROUP and (k % GROUP or k == GROUP):
            return f"{k} inputs do not make two or more groups of {GROUP}"  # one group is stored as per channel
        return None

    def shapes(self, n: int, k: int, scheme: Scheme) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of a layer."""
        found: dict[str, tuple[int, ...]] = {"B": (k // TILE_K, 2 * n), "s_channel": (1, n)}
        return found if scheme.groups(k) == 1 else {**found, "s_group": (scheme.groups(k), n)}

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Return the tensors of the layout; float16 and bfloat16 scales survive exactly."""
        if weight.scales.shape[1] == 1:
            s_channel = torch.empty(1, weight.codes.shape[0])
            s_channel[0, _channel_columns(weight.codes.shape[0])] = weight.scales.float()[:, 0] / CHANNEL_FACTOR
            return {"B": pack_codes(weight.codes, grouped=False), "s_channel": s_channel}
        s_channel, s_group = split_scales(weight)
        return {"B": pack_codes(weight.codes, grouped=True), "s_channel": s_channel, "s_group": s_group}

    def unpack(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """Return codes and float32 scales.

        Raises:
            CheckpointError: shapes or dtypes do not belong together.
        """
        packed, s_channel, s_group = tensors["B"], tensors["s_channel"], tensors.get("s_group")
        grouped = s_group is not None and s_group.numel() > 0
        n, k = packed.shape[-1] // 2, packed.shape[0] * TILE_K
        fits = packed.dim() == 2 and packed.dtype == torch.int32 and n % TILE_N == 0 and s_channel.shape == (1, n)
        if not fits or (s_group is not None and grouped and s_group.shape != (k // GROUP, n)):
            found = {name: list(tensor.shape) for name, tensor in tensors.items()}
            raise CheckpointError(
                f"The tensors of a QQQ layer do not belong together: {found}.",
                "The checkpoint is damaged or was written by another tool.",
            )
        return QuantizedWeight(unpack_codes(packed, grouped), scales(s_channel, s_group))


PACKER = QQQPacker()
