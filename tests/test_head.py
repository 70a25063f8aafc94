"""The output layer in integers: exact products, small rounding errors, and tied embeddings that stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qtoolkit import head, runtime
from qtoolkit.errors import RequestError
from qtoolkit.kernels import reference
from qtoolkit.scheme import Head

KINDS = (Head.INT8, Head.INT4)


@pytest.fixture
def weight() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(300, 256).bfloat16() * torch.rand(300, 1).bfloat16()


def stored(weight: Tensor, kind: Head) -> Tensor:
    """Return the weight that the codes and scales stand for, in float64."""
    codes, scales = (head._int8_rows if kind is Head.INT8 else head._int4_rows)(weight.float())
    n, k = weight.shape
    groups = scales.shape[1]
    values = codes.double().view(n, groups, -1) * scales.double().unsqueeze(2)
    return values.sum(1) if kind is Head.INT8 else values.reshape(n, k)


@pytest.mark.parametrize(("kind", "steps"), [(Head.INT8, 119), (Head.INT4, 7)])
def test_no_weight_moves_by_more_than_half_a_step(weight: Tensor, kind: Head, steps: int) -> None:
    groups = weight.float().view(300, 1 if kind is Head.INT8 else 2, -1)
    step = (groups.abs().amax(2, keepdim=True) / steps).expand_as(groups).reshape(300, 256)
    moved = (stored(weight, kind) - weight.double()).abs() / step
    # bfloat16 scales are off by 2**-8 of the value at most; int4 may clip what it shrinks, for a smaller sum of squares
    assert moved.max() < (0.5 + steps * 2**-8 if kind is Head.INT8 else 0.2 * steps + 0.5)
    assert moved.square().mean() < 1.1 / 12 if kind is Head.INT8 else moved.square().mean() < 1 / 12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 256), (5, 256), (2, 3, 256), (0, 256)])
def test_logits_are_those_of_the_stored_weights(weight: Tensor, kind: Head, shape: tuple[int, ...]) -> None:
    layer = head.quantize(weight, kind, torch.float32)
    x, bias = torch.randn(shape), torch.randn(300)
    codes, scales = reference.quantize_tokens(x)
    expected = (codes.double() * scales.double()) @ stored(weight, kind).t() + bias.double()
    torch.testing.assert_close(
        layer(x, bias).double(), expected, rtol=1e-5, atol=1e-5
    )  # fp32 sums of two or more terms


def test_every_int8_code_is_a_pair_of_int4_codes() -> None:
    rows = torch.arange(-119, 120).float().unsqueeze(0) * 2.0  # a scale of 2 is exact in bfloat16
    codes, scales = head._int8_rows(rows)
    assert codes.min() >= -8
    assert codes.max() <= 7
    assert torch.equal(codes[:, :239] * scales[:, :1] + codes[:, 239:] * scales[:, 1:], rows)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_zeros_gives_zero(kind: Head) -> None:
    layer = head.quantize(torch.zeros(4, 128), kind, torch.float32)
    assert torch.equal(layer(torch.randn(2, 128)), torch.zeros(2, 4))


def test_int4_wants_whole_groups() -> None:
    assert "192 inputs are not a multiple of the group size 128" in str(
        head.refuse(8, 192, Head.INT4, torch.float32, "cpu")
    )
    assert "only the reference" in str(head.refuse(8, 256, Head.INT8, torch.float64, "cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_embedding_is_not_touched(random_llama: Path, kind: Head) -> None:
    model: Any = runtime.load(random_llama)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    before = model.model.embed_tokens.weight.clone()
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model(ids).logits
    runtime.quantize_head(model, kind)
    logits = model(ids).logits
    assert torch.equal(model.model.embed_tokens.weight, before)
    difference, scale = (logits - expected).float().norm(), expected.float().norm()
    assert 0 < difference < (0.03 if kind is Head.INT8 else 0.15) * scale


def test_load_takes_the_word(random_llama: Path) -> None:
    model: Any = runtime.load(random_llama, lm_head="int8")
    assert isinstance(model.lm_head, head.HeadLayer)
    with pytest.raises(RequestError, match="int7"):
        runtime.load(random_llama, lm_head="int7")


def test_a_layer_that_cannot_run_so_is_refused(random_llama: Path) -> None:
    with pytest.raises(RequestError, match="only the reference runs it"):
        runtime.load(random_llama, dtype=torch.float64, lm_head="int8")
