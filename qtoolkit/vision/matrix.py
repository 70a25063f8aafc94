"""A convolution as a matrix product: everything that works on a linear layer's weight then works on a convolution's.

The order of a row is kernel-major, (kernel row, kernel column, input channel): consecutive entries are input channels
at one place of the kernel. N:M blocks, binary words and butterfly factors all run along it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from qtoolkit.stages import Block

Layer = nn.Conv2d | nn.Linear


@dataclass(frozen=True)
class Geometry:
    """What a layer does besides its weight; ``shape`` is the dense weight's, of two entries for a linear layer."""

    shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    @classmethod
    def of(cls, layer: nn.Module) -> Geometry:
        """Return the geometry of a convolution, a linear layer, or a layer made from one."""
        if isinstance(layer, nn.Conv2d):
            padding: tuple[int, ...] = layer.padding  # type: ignore[assignment]
            return cls(tuple(layer.weight.shape), layer.stride, padding, layer.dilation)
        if isinstance(layer, nn.Linear):
            return cls(tuple(layer.weight.shape))
        return layer.geometry  # type: ignore[return-value]

    @property
    def linear(self) -> bool:
        """Tell whether this is a linear layer's."""
        return len(self.shape) == 2

    @property
    def n(self) -> int:
        """Return the number of outputs."""
        return self.shape[0]

    @property
    def inputs(self) -> int:
        """Return the number of input channels."""
        return self.shape[1]

    @property
    def k(self) -> int:
        """Return the length of a row: kernel places times input channels."""
        return self.shape[1] if self.linear else self.shape[1] * self.shape[2] * self.shape[3]

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the convolution or matrix product of x with ``weight``, without a bias."""
        if self.linear:
            return F.linear(x, weight)
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation)

    def patches(self, x: Tensor) -> Tensor:
        """Return what each output place sees of the input x: [places, k], kernel-major."""
        if self.linear:
            return x.flatten(0, -2)
        images, channels = x.shape[:2]
        columns = F.unfold(x, self.shape[2:], self.dilation, self.padding, self.stride)  # [images, c * taps, places]
        return columns.view(images, channels, -1, columns.shape[-1]).permute(0, 3, 2, 1).reshape(-1, self.k)

    def fold(self, y: Tensor, x: Tensor) -> Tensor:
        """Return rows y [places, n], in the order of ``patches(x)``, as the layer's output for x."""
        if self.linear:
            return y.view(*x.shape[:-1], -1)
        reach = [self.dilation[i] * (self.shape[2 + i] - 1) for i in (0, 1)]  # pixels a kernel spans, less one
        height, width = ((x.shape[2 + i] + 2 * self.padding[i] - reach[i] - 1) // self.stride[i] + 1 for i in (0, 1))
        return y.view(x.shape[0], height, width, -1).permute(0, 3, 1, 2)


def weight_of(block: Block, name: str) -> nn.Parameter:
    """Return the weight of a block's layer ``name``."""
    return cast(nn.Parameter, block.layer(name).weight)


def to_matrix(weight: Tensor) -> Tensor:
    """Return a convolution's weight [n, c, height, width] as [n, height * width * c]; a matrix stays as it is."""
    return weight if weight.dim() == 2 else weight.permute(0, 2, 3, 1).flatten(1)


def from_matrix(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the weight of ``shape`` that ``to_matrix`` was given."""
    if len(shape) == 2:
        return matrix
    n, channels, height, width = shape
    return matrix.view(n, height, width, channels).permute(0, 3, 1, 2).contiguous()
