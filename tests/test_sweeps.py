"""Whole sweeps over columns, against going from column to column in float64 by the codes that they chose."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qtoolkit import sweeps
from qtoolkit.calibration import products, refine, rows
from qtoolkit.calibration.compensation import round_in_order
from qtoolkit.kernels.cpu.rounding import library as native
from qtoolkit.scheme import Scheme
from qtoolkit.stages import QuantizedWeight

RANGE = (-8, 7)
SHAPES = [(1, 1), (5, 63), (64, 128), (70, 200), (33, 769), (200, 384)]  # n, k
TIE = 0.03  # of a step: what 12 bits and the order of sums may shift a wish by
CLOSE = 4e-3  # relative, of slopes
some = pytest.mark.skipif(not native.sweeps(), reason="no AVX512-VNNI, or the library is not there")


@pytest.fixture(params=[*native.load().paths] if native.sweeps() else [])
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def hessian(k: int) -> Tensor:
    draw = torch.Generator().manual_seed(k)
    inputs = torch.randn(2 * k + 8, k, generator=draw) * (torch.rand(k, generator=draw) + 0.5)
    found = inputs.T @ inputs / len(inputs)
    return found + 0.1 * torch.diag(found.diagonal())


def layer(n: int, k: int, groups: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(n + k)
    weight, steps = torch.randn(n, k, generator=draw), torch.rand(n, groups, generator=draw) * 0.2 + 0.2
    return weight, steps * (torch.randint(0, 2, steps.shape, generator=draw) * 2 - 1)  # of both signs


def upper(matrix: Tensor) -> Tensor:
    return torch.linalg.cholesky(torch.linalg.inv(matrix.double()), upper=True).float()


def near(wish: Tensor, codes: Tensor) -> bool:
    return bool((wish.clamp(*RANGE) - codes).abs().max() < 0.5 + TIE)


@some
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_column_makes_up_for_those_before(n: int, k: int, path: str) -> None:
    weight, steps = layer(n, k, 3)
    groups, factor = torch.randint(0, 3, (k,), generator=torch.Generator().manual_seed(0)), upper(hessian(k))
    kept = weight.clone()
    codes = native.sweep_rounding(native.Packed(factor, ahead=True), weight, steps, groups, RANGE, path)
    assert codes.dtype == torch.int8
    assert weight.equal(kept)
    work, widths, spread = weight.double(), steps.double()[:, groups], factor.double()
    same = 0
    for j in range(k):
        wish = work[:, j] / widths[:, j]
        assert near(wish, codes[:, j])
        same += int((wish.round().clamp(*RANGE) == codes[:, j]).sum())
        lost = (work[:, j] - codes[:, j] * widths[:, j]) / spread[j, j]
        work[:, j:] -= lost[:, None] * spread[j, j:]
    assert same >= 0.98 * n * k


@some
@pytest.mark.parametrize(("n", "k", "groups", "block"), [
    (1, 1, 1, 128), (5, 63, 1, 64), (64, 128, 1, 128), (70, 200, 1, 32), (33, 768, 6, 128), (200, 384, 6, 64),
    (90, 320, 10, 32), (40, 768, 3, 128), (17, 769, 1, 128),
])  # fmt: skip
@pytest.mark.parametrize("visits", [1, 2])
def test_every_column_gets_the_nearest_code_in_turn(
    n: int, k: int, groups: int, block: int, visits: int, path: str
) -> None:
    matrix = hessian(k)
    weight, steps = layer(n, k, groups)
    widths = steps.repeat_interleave(k // groups, dim=1).double()
    away = torch.randint(-1, 2, (n, k), generator=torch.Generator().manual_seed(1))
    before = ((weight / widths).round() + away).clamp(*RANGE).to(torch.int8)
    gap = (before * widths - weight).float()
    packed, kept = native.Packed(matrix, ahead=False, block=block), before.clone()
    codes, first, last = native.sweep_descent(packed, gap, steps, before, RANGE, sweeps=visits, slopes=True, path=path)
    assert before.equal(kept)
    assert native.swept_product(packed, gap).equal(first)
    exact = matrix.double()
    own, apart = gap.double(), gap.double() + (codes - before.double()) * widths
    assert (first - own @ exact).norm() <= CLOSE * (own @ exact).norm()
    assert (last - apart @ exact).norm() <= CLOSE * (own @ exact).norm()
    assert ((apart @ exact) * apart).sum() <= ((own @ exact) * own).sum()
    alone = native.sweep_descent(packed, gap, steps, before, RANGE, sweeps=visits, path=path)
    assert alone[0].equal(codes)
    assert [len(each) for each in alone[1:]] == [0, 0]
    if visits == 1:
        slope = own @ exact
        for j in range(k):
            assert near(before[:, j] - slope[:, j] / (exact[j, j] * widths[:, j]), codes[:, j])
            slope += ((codes[:, j].double() - before[:, j]) * widths[:, j])[:, None] * exact[j]


@some
def test_outputs_do_not_know_of_each_other() -> None:
    k, matrix = 256, hessian(256)
    weight, steps = layer(200, k, 2)
    groups = torch.arange(k) // 128
    ahead, all_ways = native.Packed(upper(matrix), ahead=True), native.Packed(matrix, ahead=False)
    codes = native.sweep_rounding(ahead, weight, steps, groups, RANGE)
    gap = QuantizedWeight(codes, steps).dequantize() - weight
    found = native.sweep_descent(all_ways, gap, steps, codes, RANGE, slopes=True)
    threads = torch.get_num_threads()
    try:
        for count, part in ((1, slice(None)), (threads, slice(3, 4)), (threads, slice(60, 141))):
            torch.set_num_threads(count)
            alone = native.sweep_rounding(ahead, weight[part], steps[part], groups, RANGE)
            assert alone.equal(codes[part])
            parts = native.sweep_descent(all_ways, gap[part], steps[part], codes[part], RANGE, slopes=True)
            assert all(own.equal(whole[part]) for own, whole in zip(parts, found, strict=True))
    finally:
        torch.set_num_threads(threads)


@some
def test_a_matrix_may_go_once_it_is_packed_and_lie_either_way() -> None:
    matrix, (weight, steps) = hessian(200), layer(30, 200, 1)
    groups, factor = torch.zeros(200, dtype=torch.int64), upper(hessian(200))
    turned = factor.T.contiguous().T
    wanted = native.sweep_rounding(native.Packed(factor, ahead=True), weight, steps, groups, RANGE)
    packed = native.Packed(turned, ahead=True)
    turned.zero_()
    assert native.sweep_rounding(packed, weight, steps, groups, RANGE).equal(wanted)
    both = [native.Packed(each, ahead=False) for each in (matrix, matrix.clone().T)]
    matrix.zero_()
    codes = [native.sweep_descent(each, weight, steps, wanted, RANGE)[0] for each in both]
    assert codes[0].equal(codes[1])


@some
def test_what_cannot_be_swept_is_refused() -> None:
    matrix, (weight, steps) = hessian(128), layer(4, 128, 2)
    codes, groups = torch.zeros(4, 128, dtype=torch.int8), torch.zeros(128, dtype=torch.int64)
    ahead, all_ways = native.Packed(matrix, ahead=True), native.Packed(matrix, ahead=False)
    with pytest.raises(ValueError, match="no sweeps by"):
        native.Packed(matrix[:5], ahead=True)
    with pytest.raises(ValueError, match="no sweeps by"):
        native.Packed(matrix, ahead=True, block=48)
    with pytest.raises(ValueError, match=r"torch\.float32 on the CPU"):
        native.Packed(matrix.double(), ahead=True)
    for wrong in ((all_ways, weight, steps, groups), (ahead, weight[:, 1:], steps, groups),
                  (ahead, weight, steps, groups + 2), (ahead, weight, steps[1:], groups)):  # fmt: skip
        with pytest.raises(ValueError, match="no sweep over"):
            native.sweep_rounding(*wrong, RANGE)
    for wrong in ((ahead, weight, steps, codes), (all_ways, weight, steps, codes[1:]),
                  (all_ways, weight, steps, codes), (all_ways, weight, steps[:, :0], codes)):  # fmt: skip
        with pytest.raises(ValueError, match="no descent of"):  # among them groups of half a block
            native.sweep_descent(*wrong, RANGE)
    with pytest.raises(ValueError, match="no descent of"):
        native.sweep_descent(all_ways, weight, steps[:, :1], codes, RANGE, sweeps=0)
    for by, numbers in ((ahead, weight), (all_ways, weight[:, 1:])):
        with pytest.raises(ValueError, match="no product of"):
            native.swept_product(by, numbers)


@pytest.fixture
def rough() -> Iterator[None]:
    with products.fast(torch.device("cpu"), 64), products.rough():
        yield


def test_only_what_may_be_rough_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = hessian(128)
    assert products.packed(matrix) is None
    assert products.packed_factor(matrix) is None
    with products.fast(torch.device("cpu"), 64):
        assert products.packed(matrix) is None
        with products.rough():
            vnni = native.sweeps() and next(iter(native.sums()), "") == "avx512"
            assert (products.packed(matrix) is not None) == vnni
            assert products.packed(matrix, 40) is None  # no block ends where each of these groups does
            monkeypatch.setattr(native, "sweeps", lambda: False)
            assert products.packed(matrix) is None
            assert products.packed_factor(matrix) is None


@some
@pytest.mark.parametrize("size", ["channel", 128, 64, 32])
def test_sweeps_and_blocks_lower_the_error_alike(size: str | int, rough: None) -> None:
    n, k, scheme = 96, 512, Scheme(group_size=size)
    matrix, weight = hessian(k), layer(n, k, 1)[0]
    groups = 1 if size == "channel" else k // int(size)
    scales = weight.view(n, groups, -1).abs().amax(dim=2) / 7
    order = torch.randperm(k, generator=torch.Generator().manual_seed(0))
    factor, packed = upper(matrix[order][:, order]), sweeps.packed(matrix, 0 if groups == 1 else int(size))
    ahead = sweeps.packed_factor(factor)
    assert packed is not None
    assert ahead is not None
    metric = hessian(n)
    parts = rows.parts(n, k)

    def lost(found: QuantizedWeight) -> float:
        return rows.error(weight, matrix, metric, found)

    swept, blocks = (
        QuantizedWeight(round_in_order(order, each, scheme, weight, scales), scales) for each in (ahead, factor)
    )
    assert lost(swept) == pytest.approx(lost(blocks), rel=0.02)
    refined = [refine.refined(weight, matrix, swept, scheme, 2, refit=True, packed=each) for each in (packed, None)]
    assert lost(refined[0]) == pytest.approx(lost(refined[1]), rel=0.02)
    again = [refine.refined(weight, matrix, swept, scheme, 2, packed=each) for each in (packed, None)]
    errors = [float(refine.errors(weight, matrix, each).sum()) for each in (swept, *again)]
    assert errors[1] == pytest.approx(errors[2], rel=0.01)
    assert errors[1] < errors[0]
    ends = [rows.refined(weight, matrix, metric, parts, swept, scheme, each) for each in (packed, None)]
    assert lost(ends[0]) == pytest.approx(lost(ends[1]), rel=0.02)
    assert lost(ends[0]) < lost(swept)
