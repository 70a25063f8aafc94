"""Linear layers of a block in bfloat16 while it calibrates: two to four times as fast where the processor has units.

What is rounded are a product's factors and its result; sums, norms, attention and the hidden stream stay in float32.
A network served in bfloat16 rounds as much, and int8 inputs round much more away.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtoolkit.stages import Block

SMALLEST = 128  # inputs and outputs of a layer that takes part: routers, which decide by small differences, do not


def pays(device: torch.device) -> bool:
    """Tell whether products of bfloat16 are faster on ``device`` than those of float32: on CPUs with units for them."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # not every version of PyTorch can tell
    return device.type == "cpu" and supported is not None and supported()


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right`` in float32, multiplied in bfloat16 where that pays: for sums that a sample stands for."""
    if not pays(left.device):
        return left.float() @ right.float()
    return (left.bfloat16() @ right.bfloat16()).float()


def halve(block: Block) -> Block:
    """Let every linear layer of ``block`` but small ones compute in bfloat16; inputs and outputs stay float32."""
    for module in block.module.modules():
        if type(module) is nn.Linear and min(module.weight.shape) >= SMALLEST:
            module.__class__ = _Halved  # a forward of its own would be a cycle of references: memory that stays
    return block


class _Halved(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        out = F.linear(input.bfloat16(), self.weight.bfloat16()).float()
        return out if self.bias is None else out + self.bias
