"""Whole weights rounded by every native path and by torch: codes bit for bit, errors against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtoolkit import nearest
from qtoolkit.kernels.cpu.rounding import library as native

RANGE = (-8, 7)
SHAPES = [(1, 4, 4), (9, 96, 32), (17, 131, 131), (5, 2176, 128), (3, 2050, 2050)]  # n, k, inputs of a group


def weights(n: int, k: int) -> Tensor:
    torch.manual_seed(n * k)
    weight = torch.randn(n, k)
    weight[0, : k // 2] = 0.0  # whole groups of zeros, where there are several
    return weight


def expected(weight: Tensor, size: int) -> Tensor:
    """The same in torch's own float32, a group at a time."""
    made = torch.empty_like(weight)
    for part, to in zip(weight.split(size, dim=1), made.split(size, dim=1), strict=True):
        step = (part.abs().amax(dim=1, keepdim=True) / 7.0).clamp_min(nearest.SMALLEST)
        to.copy_((part / step).round().clamp(*RANGE) * step)
    return made


@pytest.mark.parametrize(("n", "k", "size"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_rounding_is_torchs_bit_for_bit(rounding_path: str, n: int, k: int, size: int, dtype: torch.dtype) -> None:
    weight, times = weights(n, k), torch.rand(k) + 0.5
    out = torch.full((n, k), torch.nan, dtype=dtype)
    assert torch.equal(nearest.rounded(weight, size, RANGE, out=out), expected(weight, size).to(dtype))
    made = nearest.rounded(weight, size, RANGE, times, out)
    assert torch.equal(made, expected(weight * times, size).to(dtype))
    assert made is out
    assert torch.equal(nearest.rounded(weight, size, RANGE), expected(weight, size))


def test_rounding_takes_rows_that_lie_apart(rounding_path: str) -> None:
    wide = weights(6, 256)
    assert torch.equal(nearest.rounded(wide[:, :128], 32, RANGE), expected(wide[:, :128], 32))
    assert torch.equal(nearest.rounded(wide.T, 6, RANGE), expected(wide.T, 6))


def test_bfloat16_is_rounded_to_nearest_even(rounding_path: str) -> None:
    size = 1.0 + 2.0**-8  # halfway between two numbers of bfloat16; times 7 it is the largest of its group
    weight = torch.tensor([[7 * size, size, -3 * size, 3 * size + 2.0**-7]])
    made = nearest.rounded(weight, 4, RANGE, out=torch.empty_like(weight, dtype=torch.bfloat16))
    assert made[0, 1] == 1.0
    assert torch.equal(made, expected(weight, 4).bfloat16())


@pytest.mark.parametrize(("n", "k", "size"), SHAPES)
@pytest.mark.parametrize("trials", [1, 9, 20])
def test_errors_are_those_of_float64(rounding_path: str, n: int, k: int, size: int, trials: int) -> None:
    weight, matter = weights(n, k), torch.rand(k) + 0.1
    scales = (torch.rand(n, k // size, trials) + 0.5) * 0.2 * (torch.randint(0, 2, (n, k // size, trials)) * 2 - 1)
    found = nearest.errors(weight, matter, scales, RANGE)
    grouped = weight.double().view(n, -1, 1, size)
    step = scales.double().unsqueeze(3)
    gap = (grouped / step).round().clamp(*RANGE) * step - grouped
    wanted = (gap.square() * matter.double().view(-1, 1, size)).sum(dim=3)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("n", "k", "size"), SHAPES)
def test_codes_stand_for_themselves_times_their_scales(rounding_path: str, n: int, k: int, size: int) -> None:
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    codes.view(-1)[:2] = torch.tensor([-128, 127])
    scales, wide = torch.rand(n, k // size) + 0.5, torch.randn(n, 2 * k)
    wanted = (codes.double().view(n, -1, size) * scales.double().unsqueeze(2)).view(n, k)
    torch.testing.assert_close(nearest.restored(codes, scales).double(), wanted, rtol=1e-7, atol=0)
    gap = nearest.restored(codes, scales, wide[:, :k])  # rows lie apart
    torch.testing.assert_close(gap.double(), wanted - wide[:, :k].double(), rtol=1e-6, atol=1e-5)
    assert torch.equal(nearest.restored(codes, scales, wide[:, :k].T.contiguous().T), gap)
    turned = codes.T.contiguous().T
    assert torch.equal(nearest.restored(turned, scales, wide[:, :k]), gap)
    assert torch.equal(nearest.restored(codes, scales.half()), nearest.restored(codes, scales.half().float()))


def test_what_the_loops_cannot_read_is_refused() -> None:
    if native.failure():
        pytest.skip(native.failure() or "")
    weight = torch.zeros(4, 8)
    with pytest.raises(ValueError, match=r"rounding loops take torch\.float32 on the CPU"):
        native.round_rows(weight, 4, RANGE, nearest.SMALLEST, out=torch.empty_like(weight, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"rounding loops take torch\.float32 on the CPU"):
        native.round_rows(weight.double(), 4, RANGE, nearest.SMALLEST)
    with pytest.raises(ValueError, match=r"a weight \[4, 8\] in groups of 4, into \[8, 4\]"):
        native.round_rows(weight, 4, RANGE, nearest.SMALLEST, out=torch.empty(8, 4))
    with pytest.raises(ValueError, match=r"codes \[4, 8\] with scales \[4, 3\]"):
        native.restored(weight.to(torch.int8), torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"a weight \[4, 8\] with scales \[4, 3, 1\]"):
        native.trial_errors(weight, torch.ones(8), torch.ones(4, 3, 1), RANGE)
    with pytest.raises(ValueError, match="with scales"):
        native.trial_errors(weight, torch.ones(8), torch.ones(4, 2, native.MOST_TRIALS + 1), RANGE)


@pytest.mark.parametrize("times", [None, torch.rand(50) + 0.5])
def test_tokens_are_rounded_as_their_codes_say(times: Tensor | None) -> None:
    x = torch.randn(3, 17, 50) * torch.logspace(-3, 3, 17).view(1, 17, 1)
    x[0, 3] = 0.0
    codes, scale = nearest.token_codes(x if times is None else x * times, 127)
    assert float(codes.abs().max()) == 127.0
    assert torch.equal(nearest.tokens(x, 127, times), codes * scale)
    wide = x.double().requires_grad_(False)
    assert nearest.tokens(wide, 127).dtype == torch.float64  # by torch
    assert nearest.tokens(x[:, :0], 127).shape == (3, 0, 50)


def test_tokens_with_nan_or_inf_stay_so() -> None:
    x = torch.randn(4, 256)
    x[0, 0], x[1, 7] = torch.nan, torch.inf
    found = nearest.tokens(x, 127)
    assert not found[0].isfinite().any()
    assert not found[1].isfinite().all()
    assert torch.equal(found[2:], nearest.tokens(x[2:].clone(), 127))
