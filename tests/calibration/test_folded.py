"""Scales on a row's base: they fold exactly in every dtype, lie near what was wanted, and cost next to nothing."""

from __future__ import annotations

import pytest
import torch

from qtoolkit.calibration import folded, grid
from qtoolkit.calibration.compensation import CompensateOptions, Solved
from qtoolkit.calibration.hessian import Hessian
from qtoolkit.kernels.folded import LEAST, MOST, split
from qtoolkit.scheme import Scheme

GROUPS = Scheme(group_size=128)


def test_multiples_end_where_those_of_kernels_do() -> None:
    assert (folded.LEAST, folded.MOST) == (LEAST, MOST)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1.0, 1e-3, 3e-7])
def test_they_fold_exactly_in_every_dtype(dtype: torch.dtype, size: float) -> None:
    scales = torch.rand(64, 24, generator=torch.Generator().manual_seed(0)).clamp_min(0.05) * size
    scales[7] = grid.SMALLEST
    scales *= torch.randint(0, 2, scales.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1  # of both signs
    stored = folded.nearest(scales, dtype)
    assert stored.dtype == dtype
    assert torch.equal(stored.sign(), scales.sign().to(dtype))
    assert split(stored) is not None


def test_a_row_of_like_scales_moves_by_a_few_percent() -> None:
    draw = torch.Generator().manual_seed(1)
    scales = 0.01 * (1 + 0.1 * torch.randn(256, 32, generator=draw))
    off = (folded.nearest(scales, torch.bfloat16).float() / scales - 1).abs()
    assert float(off.max()) < 0.07
    assert float(off.mean()) < 0.02


def test_what_matters_more_lies_nearer() -> None:
    scales = torch.tensor([[1.0, 0.43, 0.77]])
    errors = []
    for important in range(3):
        importance = torch.full((1, 3), 1e-6)
        importance[0, important] = 1.0
        errors.append(float((folded.nearest(scales, torch.bfloat16, importance) - scales).abs()[0, important]))
    alike = (folded.nearest(scales, torch.bfloat16) - scales).abs()[0]
    assert all(error <= float(other) + 1e-9 for error, other in zip(errors, alike, strict=True))
    assert sum(errors) < float(alike.sum())


def test_a_row_does_not_depend_on_how_many_are_tried_together() -> None:
    scales = torch.rand(300, 44, generator=torch.Generator().manual_seed(3)) + 0.01
    importance = torch.rand(300, 44, generator=torch.Generator().manual_seed(4))
    assert len(scales) * scales.shape[1] * len(folded.TOPS) > 2 * folded.AT_ONCE  # several parts
    rows = zip(scales.split(1), importance.split(1), strict=True)
    alone = [folded.nearest(row, torch.bfloat16, own) for row, own in rows]
    assert torch.equal(folded.nearest(scales, torch.bfloat16, importance), torch.cat(alone))


def test_one_scale_a_row_stays_as_it_is() -> None:
    scales = torch.rand(8, 1)
    assert torch.equal(folded.stored(scales, torch.float32, True), scales)


def test_a_compensated_layer_folds_and_loses_at_most_three_percent_more() -> None:
    draw = torch.Generator().manual_seed(2)
    weight = torch.randn(96, 512, generator=draw) * torch.rand(96, 1, generator=draw)
    x = torch.randn(4096, 512, generator=draw) * torch.rand(512, generator=draw)
    lost = {}
    for fold in (False, True):
        hessian = Hessian(512)
        hessian.update(x)
        solved = Solved(hessian, CompensateOptions(fold=fold))
        made = solved.quantize(weight, GROUPS, torch.bfloat16)
        lost[fold] = solved.relative_error(weight, made.dequantize() - weight)
        assert (split(made.scales) is not None) == fold
    assert lost[True] < 1.03 * lost[False]


def test_smaller_groups_keep_scales_of_their_own() -> None:
    draw = torch.Generator().manual_seed(3)
    hessian = Hessian(256)
    hessian.update(torch.randn(1024, 256, generator=draw))
    weight = torch.randn(64, 256, generator=draw)
    for size, folds in ((128, True), (64, False)):
        made = Solved(hessian, CompensateOptions()).quantize(weight, Scheme(group_size=size), torch.bfloat16)
        assert (split(made.scales) is not None) == folds
