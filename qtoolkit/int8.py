"""The W8A8 linear layer: what a layer that is too sensitive for int4 runs as beside W4A8 layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOP = 127.0  # codes of activations are -127..127, as in every W4A8 layer
ROWS = 32  # on CUDA torch's int8 product wants more than 16 rows


class W8A8Linear(nn.Module):
    """A linear layer with int8 weights, one scale a channel, that quantizes its input to int8 per token.

    The product is exact in int32: int8 inputs reach 2^31 only from 133,000 of them on.
    """

    codes: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        """Take codes int8 [n, k], scales [n, 1] and bias [n] or None."""
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scales", scales.float().flatten())
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., n] in the dtype of x [..., k]."""
        rows = x.reshape(-1, self.in_features).float()
        steps = rows.abs().amax(dim=-1, keepdim=True) / TOP  # [tokens, 1]
        rounded = (rows / steps.clamp_min(torch.finfo(torch.float32).tiny)).round_().clamp_(-TOP, TOP).to(torch.int8)
        tokens = len(rounded)
        if rounded.is_cuda:
            rounded = F.pad(rounded, (0, 0, 0, -tokens % ROWS))
        product = torch._int_mm(rounded, self.codes.t())[:tokens]  # int32 [tokens, n]
        out = product.float() * steps * self.scales
        if self.bias is not None:
            out = out + self.bias.float()
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Return what a printed model shows."""
        return f"in={self.in_features}, out={self.out_features}"
