"""Blocks of columns rounded by every native path and by torch, against the same in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtoolkit import columns
from qtoolkit.kernels.cpu.rounding import library as native

RANGE = (-8, 7)
SHAPES = [(1, 1), (5, 63), (128, 64), (37, 200), (256, 65)]


def block(count: int, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(count * n)
    rows = torch.randn(3 * count, count)
    matrix = rows.T @ rows / (3 * count)
    steps = (torch.rand(3, n) * 0.2 + 0.05) * (torch.randint(0, 2, (3, n)) * 2 - 1)  # of both signs
    return torch.randn(count, n), steps, torch.randint(0, 3, (count,)), matrix


@pytest.mark.parametrize(("count", "n"), SHAPES)
def test_rounding_makes_up_for_the_columns_before(rounding_path: str, count: int, n: int) -> None:
    weight, steps, groups, matrix = block(count, n)
    factor = torch.linalg.cholesky(matrix, upper=True)
    spread = factor / factor.diagonal().unsqueeze(1)
    kept = weight.clone()
    codes, lost = columns.rounded(weight, steps, groups, spread, RANGE)
    assert weight.equal(kept)
    work, close = weight.double(), 0
    for j in range(count):
        width = steps[groups[j]].double()
        code = (work[j] / width).round().clamp(*RANGE)
        same = codes[j].double() == code
        close += int(same.sum())
        left = work[j] - codes[j].double() * width  # go on from the codes that were chosen: a tie may fall either way
        assert ((work[j] / width).clamp(*RANGE) - codes[j].double()).abs().max() < 0.5 + 1e-3
        assert torch.allclose(lost[j].double(), left, atol=1e-4)
        work[j + 1 :] -= spread[j, j + 1 :].double().unsqueeze(1) * left
    assert close >= 0.999 * count * n


@pytest.mark.parametrize(("count", "n"), SHAPES)
def test_descent_takes_the_nearest_code_of_every_column_in_turn(rounding_path: str, count: int, n: int) -> None:
    _, steps, _, matrix = block(count, n)
    step, before = steps[0], torch.randint(*RANGE, (count, n)).float()
    slope = torch.randn(count, n) * 0.3
    codes = before.clone()
    moved = columns.descended(slope, step, matrix, codes, RANGE)
    assert torch.allclose(moved, (codes - before) * step, atol=1e-6)
    pull = slope.double()
    for j in range(count):
        wish = before[j] - pull[j] / (matrix[j, j].double() * step)
        assert (wish.clamp(*RANGE) - codes[j]).abs().max() < 0.5 + 1e-3
        pull += matrix[:, j : j + 1].double() * moved[j].double()
    assert (codes != before).any() or count == 1


def test_what_the_library_cannot_read_is_refused() -> None:
    if native.failure():
        pytest.skip(native.failure() or "")
    weight, steps, groups, matrix = block(4, 8)
    with pytest.raises(ValueError, match="groups of columns are beyond"):
        native.round_columns(weight, steps, groups + 3, matrix, RANGE)
    with pytest.raises(ValueError, match=r"torch\.float32 on the CPU"):
        native.round_columns(weight.double(), steps, groups, matrix, RANGE)
    with pytest.raises(ValueError, match="spread"):
        native.round_columns(weight, steps, groups, matrix[:3], RANGE)
    with pytest.raises(ValueError, match="dense"):
        native.descend_columns(weight, steps[0], matrix.diagonal(), matrix, weight.T.contiguous().T, RANGE)
    with pytest.raises(ValueError, match="spread"):
        native.descend_columns(weight, steps[0], matrix.diagonal(), matrix[:3], weight, RANGE)
    many = torch.zeros(native.MOST_COLUMNS + 1, 8)
    with pytest.raises(ValueError, match="columns, more than 256"):
        native.round_columns(many, steps, torch.zeros(len(many), dtype=torch.int64), torch.eye(len(many)), RANGE)


@pytest.mark.parametrize(
    ("count", "most", "size"), [(1024, 128, 0), (768, 128, 32), (300, 128, 96), (77, 10, 24), (5, 8, 0)]
)
def test_the_order_decides_every_column_once_and_tells_each_of_all_before(count: int, most: int, size: int) -> None:
    first = 3 * size  # a stretch begins with a group
    told = torch.zeros(count, count, dtype=torch.int64)
    decided: list[int] = []
    for start, stop, end in columns.steps(first, first + count, most, size):
        here = slice(start - first, stop - first)
        if end == stop:
            assert stop - start <= most
            assert not size or start // size == (stop - 1) // size
            assert decided == list(range(start - first))
            assert (told[here, : start - first] == 1).all()
            decided += range(start - first, stop - first)
        else:
            told[stop - first : end - first, here] += 1
    assert decided == list(range(count))
    assert told.max() <= 1
