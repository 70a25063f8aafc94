"""Hessian compensation against a slow float64 formulation, on random layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtoolkit import columns
from qtoolkit.calibration import compensation, grid, products, refine
from qtoolkit.calibration.compensation import CompensateOptions, Solved
from qtoolkit.calibration.hessian import Hessian
from qtoolkit.calibration.options import read
from qtoolkit.errors import RequestError
from qtoolkit.scheme import Scheme


def made(k: int, tokens: int = 400, seed: int = 0) -> tuple[Hessian, Tensor]:
    """Return a Hessian of correlated inputs, and the inputs."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=draw) * torch.rand(k, generator=draw).pow(2)
    x = torch.randn(tokens, k, generator=draw) @ mix
    hessian = Hessian(k)
    for part in x.split(77):
        hessian.update(part)
    return hessian, x


def optimal_brain(
    weight: Tensor, matrix: Tensor, scales: Tensor, scheme: Scheme, damping: float, largest_first: bool = False
) -> Tensor:
    """Round one input after another, solving exactly for all inputs still to come (OBS), in float64.

    GPTQ's Cholesky form is algebraically this: after fixing a column, the rest takes the least-squares update that the
    inverse of the remaining Hessian gives.
    """
    w, h = weight.double().clone(), matrix.double()
    h = h + torch.eye(len(h), dtype=torch.float64) * damping * h.diagonal().mean()
    keys = matrix.diagonal() if largest_first else torch.zeros(len(matrix))
    order = torch.argsort(keys, descending=True, stable=True).tolist()
    size = weight.shape[1] // scales.shape[1]
    codes = torch.zeros(weight.shape, dtype=torch.int8)
    for place, column in enumerate(order):
        step = scales[:, column // size].double()
        code = (w[:, column] / step).round().clamp(*scheme.code_range)
        codes[:, column] = code.to(torch.int8)
        rest = order[place:]
        inverse = torch.linalg.inv(h[rest][:, rest])
        error = (w[:, column] - code * step) / inverse[0, 0]
        w[:, rest] -= torch.outer(error, inverse[0])
    return codes


@pytest.mark.parametrize("largest_first", [False, True])
@pytest.mark.parametrize("stretches", [False, True])
@pytest.mark.parametrize("group_size", [16, -1])
def test_codes_equal_those_of_the_exact_formulation(
    group_size: int, stretches: bool, largest_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if stretches:  # as with thousands of inputs: several stretches, of several blocks each
        monkeypatch.setattr(columns, "TOGETHER", 20)
        monkeypatch.setattr(compensation, "COLUMNS", 6)
    hessian, _ = made(48)
    scheme = Scheme(group_size=group_size)
    weight = torch.randn(20, 48, generator=torch.Generator().manual_seed(3))
    plain = CompensateOptions(scale_search=False, refine=0, starts=1, activation_order=largest_first)
    quantized = Solved(hessian, plain).quantize(weight, scheme, torch.float32)
    expected = optimal_brain(weight, hessian.matrix, quantized.scales, scheme, 0.01, largest_first)
    differing = (quantized.codes != expected).float().mean()
    assert differing < 0.01  # a value next to a rounding tie may fall either way in fp32, and its successors follow


def test_shrinkage_is_compensation_under_the_shrunk_matrix() -> None:
    hessian, _ = made(48)
    hessian.shrinkage = 0.25
    scheme = Scheme(group_size=16)
    weight = torch.randn(20, 48, generator=torch.Generator().manual_seed(3))
    plain = CompensateOptions(scale_search=False, refine=0, starts=1)
    quantized = Solved(hessian, plain).quantize(weight, scheme, torch.float32)
    shrunk = 0.75 * hessian.matrix + 0.25 * hessian.matrix.diagonal().diag()
    expected = optimal_brain(weight, shrunk, quantized.scales, scheme, damping=0.01)
    assert (quantized.codes != expected).float().mean() < 0.01
    unshrunk = optimal_brain(weight, hessian.matrix, quantized.scales, scheme, damping=0.01)
    assert (quantized.codes != unshrunk).float().mean() > 0.05


@pytest.mark.parametrize("wide", [True, False])
def test_rough_products_round_as_well_as_exact_ones(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced here, so on a CPU without units for bfloat16, too; a narrow model's products stay exact with these."""
    monkeypatch.setattr(products.sums, "native_on", lambda device: "")
    hessian, _ = made(304)
    scheme = Scheme(group_size=152)
    weight = torch.randn(64, 304, generator=torch.Generator().manual_seed(4))
    options = CompensateOptions(fold=False, starts=1)
    plain = Solved(hessian, options).quantize(weight, scheme, torch.bfloat16)
    monkeypatch.setattr(products, "exact", lambda: False)
    with products.fast(torch.device("cpu"), products.WIDE if wide else products.WIDE - 1):
        solved = Solved(hessian, options)
        rough = solved.quantize(weight, scheme, torch.bfloat16)
    assert solved.factor is not None
    assert solved.factor.dtype == (torch.bfloat16 if wide else torch.float32)
    before, after = (float(refine.errors(weight, hessian.matrix, each).sum()) for each in (plain, rough))
    assert before * 0.98 < after < before * 1.02
    assert torch.equal(plain.codes, rough.codes) != wide


def test_wide_matrices_cross_the_lazy_block_boundary_unharmed() -> None:
    hessian, _ = made(300)
    scheme = Scheme(group_size=-1)
    weight = torch.randn(4, 300, generator=torch.Generator().manual_seed(4))
    plain = CompensateOptions(scale_search=False, refine=0, starts=1)
    quantized = Solved(hessian, plain).quantize(weight, scheme, torch.float32)
    expected = optimal_brain(weight, hessian.matrix, quantized.scales, scheme, damping=0.01)
    assert (quantized.codes != expected).float().mean() < 0.02


def test_compensation_and_scale_search_each_lower_the_output_error() -> None:
    hessian, x = made(128, tokens=1000)
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(5))
    scheme = Scheme(group_size=32)
    errors = []
    for options in (
        CompensateOptions(compensate=False, scale_search=False),
        CompensateOptions(compensate=False),
        CompensateOptions(),
    ):
        solved = Solved(hessian, options)
        served = solved.quantize(weight, scheme, torch.bfloat16).dequantize()
        errors.append(solved.relative_error(weight, served - weight))
        direct = ((weight - served) @ x.T).square().sum() / (weight @ x.T).square().sum()
        assert errors[-1] == pytest.approx(float(direct), rel=1e-3)
    assert errors[2] < 0.7 * errors[0]  # correlated inputs: compensation takes back a good part of the loss
    assert errors[1] < errors[0]


def test_scales_are_rounded_before_codes_are_chosen() -> None:
    hessian, _ = made(64)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(6))
    quantized = Solved(hessian, CompensateOptions(compensate=False)).quantize(
        weight, Scheme(group_size=16), torch.bfloat16
    )
    assert quantized.scales.dtype == torch.bfloat16
    assert torch.equal(quantized.codes, grid.to_codes(weight, quantized.scales, Scheme(group_size=16)))


def test_a_hessian_that_has_seen_nothing_is_zero_and_can_be_damped() -> None:
    torch.full((64, 64), torch.nan)  # so that new memory holds something
    hessian = Hessian(64)
    with hessian.under(0.5) as damped:
        assert damped.equal(1.5 * torch.eye(64))
    assert hessian.dead.all()
    assert not hessian.matrix.any()
    fresh, inputs = Hessian(64), torch.randn(100, 64)
    fresh.update(inputs)
    hessian.update(inputs)
    assert hessian.matrix.equal(fresh.matrix)
    assert not hessian.dead.any()


def test_dead_inputs_and_a_singular_hessian_are_survived() -> None:
    hessian = Hessian(32)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(7))  # 5 tokens: rank 5 of 32
    x[:, 3] = 0.0
    hessian.update(x)
    solved = Solved(hessian, CompensateOptions())
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(8))
    quantized = solved.quantize(weight, Scheme(group_size=-1), torch.bfloat16)
    assert not quantized.codes[:, 3].any()
    assert quantized.dequantize().isfinite().all()


def test_a_zero_weight_gets_zero_codes_and_a_scale_that_float16_holds() -> None:
    hessian, _ = made(16)
    quantized = Solved(hessian, CompensateOptions()).quantize(torch.zeros(2, 16), Scheme(group_size=8), torch.float16)
    assert not quantized.codes.any()
    assert (quantized.scales > 0).all()


def test_an_unknown_option_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RequestError, match="damping"):
        read(CompensateOptions, "gptq", {"dampin": 1})


def test_rows_are_split_into_like_parts_where_there_are_some() -> None:
    assert [compensation.even(n, 1024) for n in (7, 1024, 2048, 5632, 14336, 2053)] == [7, 1024, 1024, 704, 1024, 1024]


@pytest.mark.parametrize("size", [32, 128])
def test_scales_stay_as_searched_unless_refinement_is_to_fit_them(size: int) -> None:
    hessian, _ = made(256, tokens=1000)
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(7))
    scheme = Scheme(group_size=size)
    kept, fitted = (
        Solved(hessian, CompensateOptions(starts=1, fold=False, refit=refit)).quantize(weight, scheme, torch.bfloat16)
        for refit in (False, True)
    )
    searched = grid.searched_scales(weight, hessian.matrix.diagonal(), scheme, torch.bfloat16, signed=True)
    assert torch.equal(kept.scales, searched)
    assert not torch.equal(fitted.scales, kept.scales)
    assert refine.errors(weight, hessian.matrix, fitted).sum() < refine.errors(weight, hessian.matrix, kept).sum()
