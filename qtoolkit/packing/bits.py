"""Small unsigned integers of 1 to 8 bits side by side in bytes, lowest bit first."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def pack_bits(numbers: Tensor, width: int) -> Tensor:
    """Pack uint8 [count] below 2^width into uint8 [ceil(count * width / 8)]; the last byte is filled with zeros.

    Raises:
        ValueError: a number does not fit.
    """
    if numbers.numel() and int(numbers.max()) >> width:
        raise ValueError(f"{int(numbers.max())} does not fit {width} bits")
    bits = (numbers.unsqueeze(1) >> torch.arange(width, dtype=torch.uint8)) & 1  # [count, width]
    flat = F.pad(bits.flatten(), (0, -bits.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8)).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, width: int, count: int) -> Tensor:
    """Return the uint8 [count] that ``pack_bits`` was given."""
    bits = ((packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten()[: count * width]
    return (bits.view(count, width) << torch.arange(width, dtype=torch.uint8)).sum(dim=1, dtype=torch.uint8)
