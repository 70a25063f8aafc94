"""AMD's zentorch: bf16, W8A8, W4A16, and int4 weights with dynamic int8 activations (DA8W4)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache

import torch
import zentorch  # noqa: F401  # registers the operators
from loop import Kind, Layer, serve

GROUP = 128
ops = torch.ops.zentorch


def layer(k: int, multiply: Callable[[torch.Tensor], torch.Tensor]) -> Layer:
    """Return a layer that multiplies random tokens, made once for each number of them."""

    @cache
    def tokens(m: int) -> torch.Tensor:
        return torch.randn(m, k, dtype=torch.bfloat16)

    @torch.inference_mode()
    def run(m: int) -> None:
        multiply(tokens(m))

    return run


def bfloat16(k: int, n: int) -> Layer:
    """Make the bf16 layer with prepacked weights."""
    weight = ops.zentorch_weight_prepack_for_linear(torch.randn(n, k, dtype=torch.bfloat16))
    return layer(k, lambda x: ops.zentorch_linear_unary(x, weight, is_weight_prepacked=True))


def w8a8(k: int, n: int) -> Layer:
    """Make the W8A8 layer: int8 weights per channel, activations quantized per token."""
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    weight, scales = ops.zentorch_weight_prepack_for_dynamic_qlinear(codes), torch.rand(n).bfloat16() * 0.01
    return layer(k, lambda x: ops.zentorch_dynamic_qlinear(x, weight, scales, is_weight_prepacked=True))


def int4(groups: bool) -> Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]:
    """Return a maker of random int4 weights [n, k / 8] and scales [groups, n]."""

    def make(k: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
        return ops.zentorch_woq_repack_weight(codes), torch.rand(k // GROUP if groups else 1, n).bfloat16() * 0.01

    return make


def w4a16(k: int, n: int) -> Layer:
    """Make the weight-only int4 layer, groups of 128."""
    weight, scales = int4(True)(k, n)
    turned = weight.transpose(0, 1)
    return layer(k, lambda x: ops.zentorch_woq_linear(x, turned, scales, None))


def da8w4(groups: bool) -> Callable[[int, int], Layer]:
    """Return a maker of int4 layers with int8 activations, in groups of 128 or per channel."""

    def make(k: int, n: int) -> Layer:
        weight, scales = int4(groups)(k, n)
        return layer(k, lambda x: ops.zentorch_dynamic_qlinear(x, weight, scales))

    return make


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    torch.manual_seed(0)
    serve(
        {
            "zentorch-bf16": Kind(16, False, bfloat16),
            "zentorch-w8a8": Kind(8, True, w8a8),
            "zentorch-w4a16": Kind(4 + 16 / GROUP, False, w4a16),
            "zentorch-da8w4-g128": Kind(4 + 16 / GROUP, True, da8w4(True)),
            "zentorch-da8w4-channel": Kind(4, True, da8w4(False)),
        }
    )
