"""Folded groups: scales that are small whole multiples of one scale a row are found, and give the same product."""

from __future__ import annotations

import pytest
import torch

from qtoolkit.kernels import folded, ops, reference, selection
from qtoolkit.packing.int4 import pack_int4

GROUP = 32


def layer(n: int = 24, k: int = 128, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (n, k), generator=draw, dtype=torch.int8)
    multiples = torch.randint(folded.LEAST, folded.MOST + 1, (n, k // GROUP), generator=draw)
    base = torch.randint(8, 16, (n, 1), generator=draw) * 2.0**-10
    return codes, (multiples * base).bfloat16(), multiples


def test_multiples_and_base_are_read_off_the_scales() -> None:
    _, scales, _ = layer()
    scales[3] = 0.0
    parts = folded.split(scales)
    assert parts is not None
    multiples, base = parts
    assert multiples.dtype == torch.int8
    assert folded.LEAST <= int(multiples.min()) < 0 < int(multiples.max()) <= folded.MOST
    assert torch.equal(multiples * base[:, None], scales.float())


@pytest.mark.parametrize("wrong", [17.0, 0.71, -16.0, -17.0, float("nan"), float("inf")])
def test_one_scale_that_is_no_multiple_is_enough_to_refuse(wrong: float) -> None:
    scales = torch.ones(4, 8)
    assert folded.split(scales) is not None
    scales[2, 5] = wrong
    assert folded.split(scales) is None


def test_every_code_under_every_multiple_is_an_int8_weight() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat_interleave(2).view(16, 2)
    for multiple in range(folded.LEAST, folded.MOST + 1):
        whole = folded.integers(codes, torch.full((16, 1), multiple, dtype=torch.int8), 2)
        assert torch.equal(whole.int(), codes.int() * multiple)


def test_the_product_is_that_of_groups_up_to_float32_rounding() -> None:
    codes, scales, _ = layer()
    x = torch.randn(5, codes.shape[1], generator=torch.Generator().manual_seed(1))
    one = folded.w4a8_linear(x, codes, scales, None, GROUP)
    token_codes, token_scales = reference.quantize_tokens(x)
    dense = codes.double() * scales.double().repeat_interleave(GROUP, dim=1)
    exact = (token_codes.double() * token_scales.double()) @ dense.T
    torch.testing.assert_close(one.double(), exact, rtol=1e-6, atol=1e-6)


def test_a_layer_that_folds_takes_the_backends_folded_form_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTOOLKIT_BACKEND", "reference")
    codes, scales, _ = layer()
    n, k = codes.shape
    problem = selection.Problem(k, n, GROUP, torch.float32, "cpu")
    packed, x = pack_int4(codes), torch.randn(3, k)
    own = selection.prepare(packed, scales, problem)
    assert own.layout == "neutral folded"
    out = ops.w4a8_linear(x, own.weight, own.scales, None, n, GROUP, own.layout)
    assert torch.equal(out, folded.w4a8_linear(x, codes, scales, None, GROUP))
    assert selection.prepare(packed, scales, problem, fold=False).layout == "neutral"
    assert selection.prepare(packed, torch.rand(n, k // GROUP), problem).layout == "neutral"
