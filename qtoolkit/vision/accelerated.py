"""Binary and sparse layers on the kernels of this machine, where ``vision_selection`` says that they are faster.

``build`` makes such a layer from a packer's tensors, or says why not: then ``layers.build`` makes the dense one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from qtoolkit import registry
from qtoolkit.kernels import vision_layout as layout, vision_ops as ops, vision_selection
from qtoolkit.kernels.cpu.vision import library
from qtoolkit.kernels.vision_selection import VisionProblem
from qtoolkit.packing.binary import BinaryWeight
from qtoolkit.packing.block import BlockWeight
from qtoolkit.packing.nm import SparseWeight
from qtoolkit.vision.layers import PackedBinary
from qtoolkit.vision.matrix import Geometry, Layer, from_matrix

KINDS = ("binary", "nm", "block")
Pair = tuple[int, int]


class Accelerated(nn.Module):
    """A layer whose weight lies as a kernel reads it; ``weight`` unpacks it, for code that asks for its dtype."""

    family: str

    def __init__(self, like: Layer) -> None:
        super().__init__()
        self.geometry = Geometry.of(like)
        bias = None if like.bias is None else like.bias.detach().float()
        self.register_buffer("bias", bias)

    @property
    def shape(self) -> tuple[Pair, Pair, Pair, Pair]:
        """Return kernel, stride, padding and dilation of a convolution."""
        own = self.geometry
        return (own.shape[2:], own.stride, own.padding, own.dilation)  # type: ignore[return-value]

    @property
    def taps(self) -> int:
        """Return the places of the kernel, 1 for a linear layer."""
        return self.geometry.k // self.geometry.inputs

    @property
    def kernel(self) -> str:
        """Return the name of the kernel in reports, with the code path of this machine."""
        return f"{self.family}-{library.load().path}"

    def plain(self) -> nn.Module:
        """Return a layer of torch's own operations with the same answers, for tracing."""
        raise NotImplementedError


class AcceleratedBinary(Accelerated):
    """Signs times signs, counted; with thresholds the answers are signs too."""

    family = "binary"

    words: Tensor
    ones: Tensor
    scale: Tensor
    bias: Tensor | None
    thresholds: Tensor | None

    def __init__(self, weight: BinaryWeight, like: Layer) -> None:
        super().__init__(like)
        if self.geometry.linear:
            words, ones = layout.binary_linear(weight.signs), torch.empty(0, dtype=torch.int32)
        else:
            words, ones = layout.binary_conv(weight.signs, self.taps)
        self.register_buffer("words", words)
        self.register_buffer("ones", ones)
        self.register_buffer("scale", weight.scales.float())
        self.register_buffer("thresholds", weight.thresholds)

    @property
    def weight(self) -> Tensor:
        """Return the signs as float32, in the shape of the dense weight."""
        return from_matrix(self._signs(), self.geometry.shape)

    def _signs(self) -> Tensor:
        if self.geometry.linear:
            return layout.binary_linear_signs(self.words, self.geometry.n, self.geometry.k)
        return layout.unpack_signs(self.words, self.geometry.inputs).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for x."""
        if self.geometry.linear:
            return ops.binary_linear(x, self.words, self.scale, self.bias, self.thresholds)
        return ops.binary_conv2d(x, self.words, self.ones, self.scale, self.bias, self.thresholds, *self.shape)

    def plain(self) -> nn.Module:
        """Return a layer of torch's own operations with the same answers, for tracing."""
        signs = self._signs().to(torch.int8)
        return PackedBinary(BinaryWeight(signs, self.scale, self.thresholds), cast(Layer, self))


class AcceleratedSparse(Accelerated):
    """Sums over the weights that are left."""

    family = "sparse"

    values: Tensor
    columns: Tensor
    bias: Tensor | None

    def __init__(self, values: Tensor, columns: Tensor, like: Layer) -> None:
        super().__init__(like)
        values, columns = layout.sparse_groups(values, columns, self.geometry.k)
        self.register_buffer("values", values)
        self.register_buffer("columns", columns)

    @property
    def weight(self) -> Tensor:
        """Return the dense weight, in its shape."""
        return from_matrix(layout.sparse_matrix(self.values, self.columns, self.geometry.k), self.geometry.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for x."""
        if self.geometry.linear:
            return ops.sparse_linear(x, self.values, self.columns, self.bias)
        return ops.sparse_conv2d(x, self.values, self.columns, self.bias, *self.shape)

    def plain(self) -> nn.Module:
        """Return a layer of torch's own operations with the same answers, for tracing."""
        own, bias = self.geometry, self.bias is not None
        made: nn.Conv2d | nn.Linear
        if own.linear:
            made = nn.Linear(own.k, own.n, bias)
        else:
            kernel, stride, padding, dilation = self.shape
            made = nn.Conv2d(own.inputs, own.n, kernel, stride, padding, dilation, bias=bias)
        state = {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})
        made.load_state_dict(state)
        return made.requires_grad_(False)


def columns_of(weight: SparseWeight | BlockWeight) -> tuple[Tensor, Tensor]:
    """Return values [groups, length, rows] and columns [groups, length] of a sparse weight, kernel-major."""
    if isinstance(weight, SparseWeight):
        first = torch.arange(weight.values.shape[1]).unsqueeze(1) * weight.size
        return weight.values.flatten(1).unsqueeze(2), (weight.places.long() + first).flatten(1)
    groups, kept, taps, rows = weight.values.shape
    by_tap = weight.values.transpose(1, 2).reshape(groups, taps * kept, rows)
    columns = torch.arange(taps).view(1, -1, 1) * weight.inputs + weight.channels.long().unsqueeze(1)
    return by_tap, columns.flatten(1)


def build(kind: str, tensors: Mapping[str, Tensor], like: Layer) -> Accelerated | str:
    """Return the layer that runs ``tensors`` of packer ``kind`` on a kernel, or in words why dense torch runs it."""
    if kind not in KINDS:
        return f"{kind} layers are made of torch's own operations"
    if isinstance(like, nn.Conv2d) and (isinstance(like.padding, str) or like.padding_mode != "zeros"):
        return "kernels pad with zeros, given as numbers"
    weight = registry.packers.get(kind).unpack(tensors)
    geometry = Geometry.of(like)
    if isinstance(weight, BinaryWeight):
        return vision_selection.refuse(VisionProblem(kind, geometry.inputs)) or AcceleratedBinary(weight, like)
    values, columns = columns_of(weight)
    rows = next(count for count in range(layout.MOST_ROWS, 0, -1) if values.shape[2] % count == 0)
    left = values.numel() / like.weight.numel()
    problem = VisionProblem(kind, geometry.inputs, rows, left, geometry.k // geometry.inputs)
    return vision_selection.refuse(problem) or AcceleratedSparse(values, columns, like)


def plain(network: nn.Module) -> nn.Module:
    """Return a copy of ``network`` without kernels, every layer of torch's own operations: what ONNX export traces."""
    made = copy.deepcopy(network)
    for name, module in network.named_modules():
        if isinstance(module, Accelerated):
            made.set_submodule(name, module.plain())
    return made.eval()
