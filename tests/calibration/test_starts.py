"""Several starts of compensation: every row keeps its best, and large layers have one."""

from __future__ import annotations

import torch

from qtoolkit.calibration import starts
from qtoolkit.calibration.compensation import CompensateOptions, Solved
from qtoolkit.calibration.hessian import Hessian
from qtoolkit.calibration.refine import errors
from qtoolkit.scheme import Scheme


def solved(**options: int) -> tuple[Solved, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    hessian = Hessian(64)
    hessian.update(torch.randn(500, 64, generator=draw) @ torch.randn(64, 64, generator=draw))
    return Solved(hessian, CompensateOptions(**options)), torch.randn(40, 64, generator=draw)


def test_no_row_is_worse_and_most_are_better_with_more_starts() -> None:
    for group_size in (16, -1):
        scheme = Scheme(group_size=group_size)
        lost = []
        for wanted in (1, 2, 4):
            one, weight = solved(starts=wanted)
            found = one.quantize(weight, scheme, torch.bfloat16)
            with one.hessian.under(one.damping) as matrix:
                lost.append(errors(weight, matrix, found))
        # the first start is the first of every run, and products of more rows may sum in another order
        assert (lost[1] <= lost[0] * 1.001).all()
        assert (lost[2] <= lost[1] * 1.001).all()
        assert (lost[2] < lost[0]).float().mean() > 0.5


def test_the_same_starts_give_the_same_codes() -> None:
    (one, weight), (again, _) = solved(starts=3), solved(starts=3)
    scheme = Scheme(group_size=16)
    first, second = (each.quantize(weight, scheme, torch.float16) for each in (one, again))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scales, second.scales)


def test_orders_are_permutations_that_keep_large_inputs_early() -> None:
    diagonal = torch.linspace(1, 1000, 200)
    for order in starts.orders(diagonal, 3):
        assert torch.equal(order.sort().values, torch.arange(200))
        assert diagonal[order[:50]].mean() > 1.5 * diagonal[order[-50:]].mean()


def test_a_large_layer_has_one_start() -> None:
    assert starts.count(256, 768, 2) == (2, 4)
    assert starts.count(4096, 4096, 2) == (1, 1)
    assert starts.count(256, 768, 1) == (1, 1)
