"""Scales of a grid whose codes reach one step further down than up: their sign gives that step to the larger end."""

from __future__ import annotations

import pytest
import torch

from qtoolkit.calibration import grid
from qtoolkit.calibration.compensation import CompensateOptions, Solved
from qtoolkit.calibration.hessian import Hessian
from qtoolkit.scheme import Scheme

GROUPS = Scheme(group_size=32)


def weights(n: int = 64, k: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def test_signed_scales_clip_nothing_and_turn_with_the_weight() -> None:
    weight = weights()
    weight[3] = 0.0
    weight[4] = weight[4].abs()
    scales = grid.signed_scales(weight, GROUPS)
    steps = grid.groups(weight, GROUPS).double() / scales.double().unsqueeze(-1)
    assert float(steps.min()) >= -8 - 1e-6
    assert float(steps.max()) <= 7 + 1e-6
    reached = (steps.amin(dim=-1) + 8).abs().minimum((steps.amax(dim=-1) - 7).abs())
    assert float(reached[weight.abs().sum(dim=1) > 0].max()) < 1e-6  # no smaller scale would do
    turned = grid.signed_scales(-weight, GROUPS)
    assert torch.equal(turned[weight.any(dim=1)], -scales[weight.any(dim=1)])
    assert (scales[4] < 0).all()
    assert torch.equal(scales[3], torch.full_like(scales[3], grid.SMALLEST))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_search_finds_better_scales_where_they_may_be_negative(dtype: torch.dtype) -> None:
    weight, importance = weights(), torch.rand(256, generator=torch.Generator().manual_seed(1)) + 0.5
    lost = {}
    for signed in (False, True):
        scales = grid.searched_scales(weight, importance, GROUPS, dtype, signed=signed)
        assert scales.dtype == dtype
        assert bool((scales < 0).any()) == signed
        made = grid.groups(grid.to_codes(weight, scales, GROUPS), GROUPS).double() * scales.double().unsqueeze(-1)
        gap = made - grid.groups(weight, GROUPS)
        lost[signed] = float((gap.square() * grid.groups(importance[None], GROUPS)).sum())
    assert lost[True] < 0.93 * lost[False]


@pytest.mark.parametrize("group_size", [128, "channel"])
def test_compensation_gains_by_signs_and_int8_layers_have_none(group_size: int | str) -> None:
    hessian, weight = Hessian(256), weights(seed=2)
    hessian.update(weights(2048, 256, seed=3))
    scheme, lost = Scheme(group_size=group_size), {}
    for signed in (False, True):
        solved = Solved(hessian, CompensateOptions(signed=signed))
        made = solved.quantize(weight, scheme, torch.bfloat16)
        assert bool((made.scales < 0).any()) == signed
        lost[signed] = solved.relative_error(weight, made.gap(weight))
    assert lost[True] < 0.97 * lost[False]
    eight = Scheme(weight_bits=8, group_size="channel")
    assert (Solved(hessian, CompensateOptions()).quantize(weight, eight, torch.float32).scales > 0).all()
