"""Layers that run packed weights, one kind for each packer, in plain torch: exact, the reference of every kernel.

``build`` makes the layer of a packer from its tensors. Butterfly and binary layers are the ones that are trained too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from qtoolkit import registry
from qtoolkit.packing.binary import BinaryWeight
from qtoolkit.packing.debut import ButterflyWeight
from qtoolkit.packing.filter import FilterWeight
from qtoolkit.vision import butterfly
from qtoolkit.vision.butterfly import Chain
from qtoolkit.vision.matrix import Geometry, Layer, from_matrix, to_matrix

VARIANCE_FLOOR = 1e-5


class Signs(torch.autograd.Function):
    """Sign with sign(0) = +1; the gradient is the Bi-Real polynomial's, g * max(0, 2 - 2|x|), at x / s.

    s is the deviation of x's sample: positive, so it changes no sign. As in OvSW the gradient passes through s, too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return -1 or +1 of x [samples, ...]."""
        ctx.dims, ctx.count = tuple(range(1, x.dim())), x[0].numel()
        mean = x.mean(ctx.dims, keepdim=True)
        squares = torch.linalg.vector_norm(x, dim=ctx.dims, keepdim=True).square()  # in one pass, without a copy
        variance = (squares - ctx.count * mean.square()) / max(ctx.count - 1, 1)
        ctx.save_for_backward(x, mean, (variance.clamp_min(0) + VARIANCE_FLOOR).sqrt())
        return signs(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Return the gradient for x: (h - (x - mean) sum(h x / s) / ((n - 1) s)) / s, h = g max(0, 2 - 2|x / s|)."""
        x, mean, s = ctx.saved_tensors
        scaled = x / s
        local = scaled.abs().mul_(-2).add_(2).clamp_min_(0).mul_(grad)
        total = scaled.mul_(local).sum(ctx.dims, keepdim=True)
        return local.div_(s).sub_((x - mean).mul_(total / (max(ctx.count - 1, 1) * s.square())))


def signs(x: Tensor) -> Tensor:
    """Return +1 where x >= 0 and -1 elsewhere, NaN included (torch.sign has a third value, 0)."""
    return (x >= 0).to(x.dtype).mul_(2).sub_(1)


class Binary(nn.Module):
    """Signs of the input times signs of the weight times a scale per output; trained as in OvSW (Xiang et al. 2024).

    The latent weight is standardised for its scale, the gradient passes its sign unchanged, and in training the
    signs' gradient is that at an input divided by its sample's deviation (``Signs``). Once a norm and a sign
    are folded in (``calibration/fold.py``), ``thresholds`` and ``turned``, the outputs whose signs all change, replace
    scale and bias, and the layer's output is a sign.
    """

    thresholds: Tensor | None
    turned: Tensor | None

    def __init__(self, like: Layer) -> None:
        super().__init__()
        self.geometry = Geometry.of(like)
        self.register_buffer("thresholds", None)
        self.register_buffer("turned", None)
        self.weight = nn.Parameter(like.weight.detach().clone())
        self.bias = nn.Parameter(like.bias.detach().clone()) if like.bias is not None else None

    def scales(self) -> Tensor:
        """Return mean |standardised weight| per output: [n]."""
        flat = self.weight.detach().flatten(1)
        centred = flat - flat.mean(dim=1, keepdim=True)
        return (centred / (centred.var(dim=1, keepdim=True) + VARIANCE_FLOOR).sqrt()).abs().mean(dim=1)

    def packed(self) -> BinaryWeight:
        """Return what is stored."""
        matrix = signs(to_matrix(self.weight.detach()))
        if self.turned is not None:
            matrix[self.turned] *= -1
        return BinaryWeight(matrix.to(torch.int8), self.scales(), self.thresholds)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for x."""
        if self.thresholds is not None:
            return PackedBinary(self.packed(), cast(Layer, self))(x)
        hard = self.weight + (signs(self.weight) - self.weight).detach()
        binary = Signs.apply(x) if self.training else signs(x)
        return scaled(self.geometry.product(binary, hard), self.scales(), self.bias, linear=self.geometry.linear)


class PackedBinary(nn.Module):
    """A binary layer from its packed form; the sums of +-1 are whole numbers, so every order of summing is exact."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    thresholds: Tensor | None

    def __init__(self, weight: BinaryWeight, like: Layer) -> None:
        super().__init__()
        self.geometry = Geometry.of(like)
        self.register_buffer("weight", from_matrix(weight.signs.float(), tuple(like.weight.shape)))
        self.register_buffer("scale", weight.scales)
        self.register_buffer("bias", like.bias.detach() if like.bias is not None else None)
        self.register_buffer("thresholds", weight.thresholds)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for x, its sign where thresholds are folded in; padding adds nothing to a sum."""
        sums = self.geometry.product(signs(x), self.weight)
        if self.thresholds is not None:
            return signs(sums - self.thresholds.view((1, -1, 1, 1) if sums.dim() == 4 else (-1,)))
        return scaled(sums, self.scale, self.bias, linear=self.geometry.linear)


class Butterfly(nn.Module):
    """A layer whose weight is a product of sparse factors, applied one after the other."""

    def __init__(self, chain: Chain, flat: Tensor, like: Layer) -> None:
        super().__init__()
        self.geometry, self.chain = Geometry.of(like), chain
        self.flat = nn.Parameter(flat.clone())
        self.bias = nn.Parameter(like.bias.detach().clone()) if like.bias is not None else None

    def packed(self) -> ButterflyWeight:
        """Return what is stored."""
        return ButterflyWeight(self.chain, self.flat.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for x."""
        values = butterfly.split(self.flat, self.chain)
        y = butterfly.apply(self.geometry.patches(x), self.chain, values)
        return self.geometry.fold(y if self.bias is None else y + self.bias, x)


class Filtered(nn.Module):
    """A layer without its removed filters: reads the channels that are left, writes zeros where a filter was."""

    weight: Tensor
    rows: Tensor
    channels: Tensor
    bias: Tensor | None

    def __init__(self, weight: FilterWeight, like: Layer) -> None:
        super().__init__()
        self.geometry = Geometry.of(like)
        shape = (len(weight.rows), len(weight.channels), *self.geometry.shape[2:])
        self.register_buffer("weight", from_matrix(weight.values.flatten(1), shape))
        self.register_buffer("rows", weight.rows.long())
        self.register_buffer("channels", weight.channels.long())
        self.register_buffer("bias", like.bias.detach() if like.bias is not None else None)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for x."""
        axis = -1 if self.geometry.linear else 1
        if self.channels.shape[0] != self.geometry.inputs:
            x = x.index_select(axis, self.channels)
        y = self.geometry.product(x, self.weight)
        if self.rows.shape[0] != self.geometry.n:
            shape = list(y.shape)
            shape[axis] = self.geometry.n
            y = y.new_zeros(shape).index_copy_(axis, self.rows, y)
        return scaled(y, None, self.bias, linear=self.geometry.linear)


def scaled(y: Tensor, scale: Tensor | None, bias: Tensor | None, *, linear: bool) -> Tensor:
    """Return y times a scale per channel plus a bias per channel; channels come last behind a linear layer."""
    shape = (-1,) if linear else (1, -1, 1, 1)
    y = y if scale is None else y * scale.view(shape)
    return y if bias is None else y + bias.view(shape)


def _dense(weight: Any, like: Layer) -> nn.Module:
    """Return a float layer with the unpacked weight: what runs where no sparse kernel does."""
    layer: Any = copy.deepcopy(like)
    layer.weight = nn.Parameter(from_matrix(weight.dequantize(), tuple(like.weight.shape)), requires_grad=False)
    return layer


BUILDERS: dict[str, Callable[[Any, Any], nn.Module]] = {
    "nm": _dense,
    "block": _dense,
    "filter": Filtered,
    "binary": PackedBinary,
    "debut": lambda weight, like: Butterfly(weight.chain, weight.flat, like),
}


def build(kind: str, tensors: Mapping[str, Tensor], like: Layer) -> nn.Module:
    """Return the layer that runs ``tensors`` of packer ``kind`` with the geometry and the bias of ``like``."""
    return BUILDERS[kind](registry.packers.get(kind).unpack(tensors), like)
