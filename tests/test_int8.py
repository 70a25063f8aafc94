"""The W8A8 layer against the formula in float64."""

from __future__ import annotations

import pytest
import torch

from qtoolkit.int8 import W8A8Linear


@pytest.mark.parametrize("tokens", [1, 2, 17, 40])
@pytest.mark.parametrize(("n", "k"), [(1, 8), (24, 172), (64, 1000)])
def test_the_layer_computes_the_formula(tokens: int, n: int, k: int) -> None:
    draw = torch.Generator().manual_seed(n + k)
    codes = torch.randint(-128, 128, (n, k), generator=draw, dtype=torch.int8)
    scales, bias = torch.rand(n, 1, generator=draw) + 0.01, torch.randn(n, generator=draw)
    x = torch.randn(2, tokens, k, generator=draw)
    x[0, 0] = 0  # a token of zeros gives the bias
    out = W8A8Linear(codes, scales, bias)(x)

    steps = x.abs().amax(-1, keepdim=True) / 127
    rounded = torch.where(steps > 0, (x / steps).round(), 0.0).double()
    expected = (rounded @ codes.double().T) * steps * scales.T + bias
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-5)  # the int32 product is exact
    assert torch.equal(out[0, 0], bias)


def test_bfloat16_in_gives_bfloat16_out() -> None:
    codes = torch.ones(4, 16, dtype=torch.int8)
    layer = W8A8Linear(codes, torch.ones(4, 1, dtype=torch.bfloat16), None)
    assert layer(torch.ones(3, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16
