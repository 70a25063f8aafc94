"""One contract for every packer: pure, invertible, and its runtime layer gives the transformed float layer's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtoolkit import registry
from qtoolkit.runtime import _float_layer
from qtoolkit.scheme import CHANNEL, INT8, Scheme
from qtoolkit.stages import QuantizedWeight
from qtoolkit.vision import butterfly, layers
from qtoolkit.vision.matrix import Geometry, from_matrix, to_matrix
from qtoolkit.vision.pattern import Pattern


@dataclass
class Case:
    """A packer's weight, the float layer it comes from, and the layer made from the packed tensors."""

    weight: Any
    layer: nn.Module
    x: Tensor
    build: Callable[[Mapping[str, Tensor]], nn.Module]


def integers(kind: str, seed: int) -> Case:
    generator = torch.Generator().manual_seed(seed)
    group = CHANNEL if seed % 2 else 128
    n, k = 128, 256
    half = 128 if kind == "int8" else 8
    codes = torch.randint(-half, half, (n, k), generator=generator, dtype=torch.int8)
    scheme = INT8 if kind == "int8" else Scheme(group_size=group)
    scales = torch.rand(n, scheme.groups(k), generator=generator).half().float() + 2**-6
    weight = QuantizedWeight(codes, scales.half().float())
    linear = nn.Linear(k, n, bias=False)
    linear.weight.data = weight.dequantize()
    packer = registry.packers.get(kind)
    return Case(
        weight,
        linear,
        torch.randn(3, k, generator=generator),
        lambda tensors: _float_layer(packer.unpack(tensors), None, torch.float32, "cpu"),
    )


PATTERNS = {"nm": ("2:4", "4:8", "1:16"), "block": ("1x4", "1x16"), "filter": ("filter",)}


def masked(kind: str, seed: int) -> Case:
    """A convolution or linear layer whose weight has the pattern."""
    generator = torch.Generator().manual_seed(seed)
    pattern = Pattern(pattern=PATTERNS[kind][seed % len(PATTERNS[kind])], rate=0.0 if kind == "nm" else 0.4)
    layer = conv(seed) if seed % 2 else nn.Linear(48, 32)
    matrix = to_matrix(layer.weight.data).clone()
    if kind == "nm":
        kept, size = pattern.nm
        blocks = matrix.view(len(matrix), -1, size)
        blocks[torch.rand(blocks.shape, generator=generator).argsort(dim=-1) >= kept] = 0
    else:
        inputs = layer.weight.shape[1]
        cube = matrix.view(len(matrix), -1, inputs)
        if kind == "filter":
            cube[torch.rand(len(cube), generator=generator) < 0.4] = 0
            cube[:, :, torch.rand(inputs, generator=generator) < 0.4] = 0
        else:
            lost = torch.rand(len(cube) // pattern.rows, inputs, generator=generator).argsort(dim=1) < inputs // 3
            cube[lost.repeat_interleave(pattern.rows, 0).unsqueeze(1).expand_as(cube)] = 0
    layer.weight.data = from_matrix(matrix, tuple(layer.weight.shape))
    inputs = Geometry.of(layer).inputs
    weight = registry.packers.get(kind).read(matrix, pattern, inputs)
    return Case(weight, layer, example(layer, generator), lambda tensors: layers.build(kind, tensors, layer))


def trained(kind: str, seed: int) -> Case:
    """A binary or butterfly layer as training leaves it."""
    generator = torch.Generator().manual_seed(seed)
    like: nn.Module = conv(seed) if seed % 2 else nn.Linear(48, 32)
    k = Geometry.of(like).k
    if kind == "binary":
        made: nn.Module = layers.Binary(like)
    else:
        chain = butterfly.chain(k, ((16, k // 4, 1), (2, 4, 16)) if k % 4 == 0 else ((32, k, 1),))
        made = layers.Butterfly(chain, torch.randn(butterfly.nonzeros(chain), generator=generator), like)
    made.eval()
    return Case(
        made.packed(),
        made,
        example(like, generator),
        lambda tensors: layers.build(kind, tensors, like),  # type: ignore[operator]
    )


def conv(seed: int) -> nn.Conv2d:
    torch.manual_seed(seed)
    return nn.Conv2d(16, 32, 3, stride=1 + seed % 3 // 2, padding=1)


def example(layer: nn.Module, generator: torch.Generator) -> Tensor:
    return torch.randn(*((2, 16, 9, 7) if isinstance(layer, nn.Conv2d) else (5, 48)), generator=generator)


INTEGERS = ("int4", "int8", "qqq", "gptq")
CASES = (
    dict.fromkeys(INTEGERS, integers) | dict.fromkeys(PATTERNS, masked) | dict.fromkeys(("binary", "debut"), trained)
)


def test_every_packer_has_a_case() -> None:
    assert set(CASES) == set(registry.packers.names())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", sorted(CASES))
def test_the_layer_built_from_packed_tensors_gives_the_float_layers_output(kind: str, seed: int) -> None:
    case = CASES[kind](kind, seed)
    with torch.inference_mode():
        expected = case.layer(case.x)
        found = case.build(registry.packers.get(kind).pack(case.weight))(case.x)
    # fp32 sums in another order: filters and factors leave out zeros, everything else is the same product
    bound = 1e-5 * float(expected.abs().max()) if kind in ("filter", "debut") else 0.0
    assert (found - expected).abs().max() <= bound


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", sorted(CASES))
def test_packing_then_unpacking_then_packing_gives_the_same_bytes(kind: str, seed: int) -> None:
    packer = registry.packers.get(kind)
    case = CASES[kind](kind, seed)
    tensors = packer.pack(case.weight)
    again = packer.pack(packer.unpack(tensors))
    assert tensors.keys() == again.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == again[name].dtype
        assert torch.equal(tensor, again[name]), name
    assert torch.equal(packer.unpack(tensors).dequantize(), case.weight.dequantize())
