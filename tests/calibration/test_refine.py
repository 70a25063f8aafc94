"""Coordinate descent and refitted scales: never worse, and where a brute-force search ends as well."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from qtoolkit import columns
from qtoolkit.calibration import grid, refine
from qtoolkit.calibration.refine import descend, errors, gradient, refined, refitted_scales
from qtoolkit.scheme import Scheme
from qtoolkit.stages import QuantizedWeight


def made(n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a weight and a positive definite matrix of correlated inputs."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * k, k, generator=draw) @ torch.randn(k, k, generator=draw)
    return torch.randn(n, k, generator=draw), x.T @ x / len(x) + 0.01 * torch.eye(k)


def start_of(weight: Tensor, scheme: Scheme, dtype: torch.dtype = torch.bfloat16) -> QuantizedWeight:
    scales = grid.minmax_scales(weight, scheme, dtype)
    return QuantizedWeight(grid.to_codes(weight, scales, scheme), scales)


@pytest.mark.parametrize("stretches", [False, True])
@pytest.mark.parametrize("group_size", [32, -1])
def test_no_row_gets_worse_and_together_they_get_better(
    group_size: int, stretches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if stretches:  # as with thousands of inputs: they end within groups of 32, and have several blocks each
        monkeypatch.setattr(columns, "TOGETHER", 48)
        monkeypatch.setattr(refine, "COLUMNS", 10)
    weight, matrix = made(40, 160)  # 160: more than one part of the descent
    scheme = Scheme(group_size=group_size)
    before = start_of(weight, scheme)
    scaled = QuantizedWeight(before.codes, refitted_scales(weight, matrix, before, scheme))
    slope = gradient(weight, matrix, before)
    moved = QuantizedWeight(descend(matrix, before, scheme, slope), before.scales)
    # fp32: a gradient that follows differs from a new one by the order of the sums
    torch.testing.assert_close(slope, gradient(weight, matrix, moved), rtol=1e-3, atol=1e-4 * float(slope.abs().max()))
    after = refined(weight, matrix, before, scheme, rounds=3, refit=True)
    codes = refined(weight, matrix, before, scheme, rounds=3)
    old = errors(weight, matrix, before)
    for better in (scaled, moved, codes, after):
        # fp32: the gradient is carried along through 160 updates
        assert (errors(weight, matrix, better) <= old * (1 + 1e-4)).all()
    assert errors(weight, matrix, moved).sum() < 0.7 * old.sum()  # min-max rounding leaves much to gain
    assert errors(weight, matrix, after).sum() < errors(weight, matrix, moved).sum()
    assert torch.equal(codes.scales, before.scales)
    assert after.scales.dtype == torch.bfloat16
    assert int(after.codes.min()) >= -8
    assert int(after.codes.max()) <= 7


def test_one_descent_is_that_of_a_slow_loop_in_float64() -> None:
    weight, matrix = made(6, 150)
    scheme = Scheme(group_size=-1)
    before = start_of(weight, scheme)
    w, h, s = weight.double(), matrix.double(), before.scales.double()
    codes = before.codes.double()
    for row, column in itertools.product(range(6), range(150)):
        options = codes[row].repeat(16, 1)
        options[:, column] = torch.arange(-8, 8)
        lost = options * s[row] - w[row]
        codes[row, column] = float(((lost @ h) * lost).sum(dim=1).argmin()) - 8
    found = descend(matrix, before, scheme, gradient(weight, matrix, before))
    assert (found != codes.to(torch.int8)).float().mean() < 0.01  # a near tie in fp32 may fall either way


def test_refitted_scales_are_least_squares() -> None:
    weight, matrix = made(5, 64)
    scheme = Scheme(group_size=16)
    before = start_of(weight, scheme, torch.float32)
    found = refitted_scales(weight, matrix, before, scheme)
    root = torch.linalg.cholesky(matrix.double())
    for row in range(5):
        columns = torch.zeros(64, 4, dtype=torch.float64)
        for group in range(4):
            columns[16 * group : 16 * group + 16, group] = before.codes[row, 16 * group : 16 * group + 16].double()
        expected = torch.linalg.lstsq(root.T @ columns, root.T @ weight[row].double()).solution
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-3, atol=1e-5)


def test_a_row_of_zeros_stays_one() -> None:
    weight, matrix = made(3, 32)
    weight[1] = 0.0
    scheme = Scheme(group_size=8)
    after = refined(weight, matrix, start_of(weight, scheme), scheme, rounds=2, refit=True)
    assert not after.codes[1].any()
    assert (after.scales > 0).all()


def test_the_same_input_gives_the_same_codes() -> None:
    weight, matrix = made(20, 130)
    scheme = Scheme(group_size=-1)
    once, again = (refined(weight, matrix, start_of(weight, scheme), scheme, rounds=2, refit=True) for _ in range(2))
    assert torch.equal(once.codes, again.codes)
    assert torch.equal(once.scales, again.scales)
