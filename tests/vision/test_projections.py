"""Masks keep what a pattern says, no more and no less, at every stage of a schedule."""

from __future__ import annotations

import pytest
import torch

from qtoolkit.calibration import criteria, projections
from qtoolkit.calibration.schedules import SCHEDULES, still_dense
from qtoolkit.errors import RequestError
from qtoolkit.vision.matrix import to_matrix
from qtoolkit.vision.pattern import Pattern

WEIGHT = torch.randn(32, 16, 3, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:16"])
def test_an_nm_mask_keeps_the_largest_of_every_block(pattern: str) -> None:
    kept, size = Pattern(pattern=pattern).nm
    mask = to_matrix(projections.mask(WEIGHT, Pattern(pattern=pattern))).view(-1, size)
    assert (mask.sum(dim=1) == kept).all()
    blocks = to_matrix(WEIGHT).abs().view(-1, size)
    lost = torch.where(mask == 0, blocks, 0.0).amax(dim=1)
    assert (torch.where(mask == 1, blocks, torch.inf).amin(dim=1) >= lost).all()


def test_blocks_with_large_sums_are_pruned_first() -> None:
    mask = to_matrix(projections.nm_mask(WEIGHT, 2, 4, dense=0.25)).view(-1, 4)
    sums = to_matrix(WEIGHT).abs().view(-1, 4).sum(dim=1)
    whole = mask.sum(dim=1) == 4
    assert int(whole.sum()) == round(0.25 * len(mask))
    assert sums[whole].max() <= sums[~whole].min()


def test_a_soft_mask_has_the_hard_masks_zeros_and_lies_between_one_and_three() -> None:
    hard, soft = projections.nm_mask(WEIGHT, 2, 4), projections.soft_mask(WEIGHT, 2, 4)
    assert torch.equal(soft == 0, hard == 0)
    assert soft[hard == 1].min() >= 1
    assert soft.max() < 3 + 1e-6


def test_every_group_of_a_1xn_mask_keeps_equally_many_input_channels() -> None:
    mask = projections.mask(WEIGHT, Pattern(pattern="1x8", rate=0.5))
    groups = mask.expand_as(WEIGHT).reshape(4, 8, 16, 9)
    assert (groups == groups[:, :1, :, :1]).all()
    assert (groups[:, 0, :, 0].sum(dim=1) == 8).all()


@pytest.mark.parametrize("criterion", criteria.WEIGHT)
def test_a_filter_mask_removes_the_rate(criterion: str) -> None:
    mask = projections.mask(WEIGHT, Pattern(pattern="filter", rate=0.3), criterion=criterion)
    assert mask.shape == (32, 1, 1, 1)
    assert int((mask == 0).sum()) == int(0.3 * 32)


def test_fpgm_removes_the_filter_nearest_to_the_others() -> None:
    weight = torch.eye(8).view(8, 8, 1, 1) * 5
    weight[3] = 5 / 8  # the mean of all
    assert int(criteria.weight_score(weight, "fpgm").argmin()) == 3


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_a_schedule_falls_to_zero_at_the_end_of_its_ramp(name: str) -> None:
    values = [still_dense(name, progress / 20, 0.5) for progress in range(21)]
    assert values == sorted(values, reverse=True)
    assert values[10:] == [0.0] * 11
    assert values[0] == (0.0 if name == "one-shot" else pytest.approx(1.0))
    with pytest.raises(RequestError, match="linear"):
        still_dense("liner", 0, 1)


@pytest.mark.parametrize("text", ["4:2", "2:4:8", "1x1", "half", "0:4"])
def test_a_pattern_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        Pattern(pattern=text)


def test_a_latent_weight_under_its_soft_mask_is_the_sparse_weight() -> None:
    weight = torch.randn(32, 16, 3, 3, generator=torch.Generator().manual_seed(0)) * 0.1
    sparse = weight * projections.nm_mask(weight, 2, 4)
    latent = projections.latent(sparse, 2, 4)
    assert (latent.abs() <= sparse.abs()).all()
    torch.testing.assert_close(latent * projections.soft_mask(latent, 2, 4), sparse, rtol=1e-5, atol=1e-7)
