"""Rounding under a metric of the outputs, against float64 formulations of what it should do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtoolkit.calibration import grid, rows
from qtoolkit.calibration.compensation import CompensateOptions, Solved
from qtoolkit.calibration.hessian import Hessian
from qtoolkit.scheme import Scheme
from qtoolkit.stages import QuantizedWeight

N, K, HEAD = 24, 40, 6


def made(seed: int = 0) -> tuple[Tensor, Hessian, Tensor]:
    """Return a weight, its Hessian and a metric with strong coupling between outputs."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(200, K, generator=draw) @ torch.randn(K, K, generator=draw)
    hessian = Hessian(K)
    hessian.update(x)
    root = torch.randn(10, N, generator=draw)
    metric = root.T @ root / 10 + 0.2 * torch.eye(N)
    return torch.randn(N, K, generator=draw), hessian, metric


def test_later_rows_make_up_for_earlier_ones_as_least_squares_would() -> None:
    """What rows still to come should be, given those rounded, is the minimum of tr(G D D^T), solved in float64."""
    weight, _, metric = made()
    scheme, several = Scheme(group_size=-1), rows.parts(N, K, HEAD)
    scales = grid.minmax_scales(weight, scheme, torch.float32)
    found = rows.rounded(
        weight,
        metric,
        several,
        scales,
        lambda part, own: QuantizedWeight(grid.to_codes(part, own, scheme), own),
    )
    g, w, done = metric.double(), weight.double(), torch.tensor([], dtype=torch.int64)
    lost, codes = torch.zeros(N, K, dtype=torch.float64), torch.zeros(N, K)
    for number, part in enumerate(several):
        later = torch.cat(several[number:])
        wish = w[later]
        if len(done):
            wish = wish - torch.linalg.solve(g[later][:, later], g[later][:, done] @ lost[done])
        wish = wish[: len(part)]
        codes[part] = (wish / scales[part].double()).round().clamp(-8, 7).float()
        lost[part] = codes[part].double() * scales[part].double() - w[part]
        done = torch.cat([done, part])
    assert (found.codes != codes.to(torch.int8)).float().mean() < 0.01  # near ties may fall either way in fp32


def test_every_row_is_in_one_part_and_a_part_takes_channels_of_every_head() -> None:
    assert torch.equal(torch.cat(rows.parts(1000, K)).sort().values, torch.arange(1000))
    assert [part.tolist() for part in rows.parts(8, K, 4)] == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_layers_with_many_inputs_have_fewer_parts() -> None:
    assert [len(rows.parts(4096, k, 128)) for k in (256, 1024, 4096, 11008, 1 << 20)] == [64, 32, 8, 2, 2]
    assert {len(part) for part in rows.parts(2048, 5632)} == {512}  # four like ones, where five would do
    assert len(rows.parts(2053, 5632)) == 5  # a prime


def test_refining_never_raises_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian, metric = made(1)
    scheme, several = Scheme(group_size=8), rows.parts(N, K, HEAD)
    with hessian.under(0.01) as damped:
        matrix = damped.clone()
    scales = grid.minmax_scales(weight, scheme, torch.bfloat16)
    before = QuantizedWeight(grid.to_codes(weight, scales, scheme), scales)
    after = rows.refined(weight, matrix, metric, several, before, scheme)
    errors = [float(_error(weight, matrix, metric, each)) for each in (before, after)]
    assert errors[1] < 0.7 * errors[0]  # codes only, each visited once

    def worse(matrix: Tensor, start: QuantizedWeight, scheme: Scheme, slope: Tensor) -> Tensor:
        slope -= 2 * matrix @ start.dequantize().T
        return -start.codes

    monkeypatch.setattr(rows, "descend", worse)
    noise = rows.refined(weight, matrix, metric, several, after, scheme)
    assert torch.equal(noise.codes, after.codes)  # nothing that raises it is taken


def test_a_part_of_one_row_is_refined_too() -> None:
    weight, hessian, metric = made(3)
    scheme = Scheme(group_size=-1)
    matrix, several = hessian.matrix + 0.1 * torch.eye(K), [torch.tensor([row]) for row in range(N)]
    scales = grid.minmax_scales(weight, scheme, torch.float32)
    start = QuantizedWeight(grid.to_codes(weight, scales, scheme), scales)
    after = rows.refined(weight, matrix, metric, several, start, scheme)
    assert rows.error(weight, matrix, metric, after) < 0.9 * rows.error(weight, matrix, metric, start)


def test_more_rounds_of_refinement_lose_less_under_the_metric() -> None:
    weight, hessian, metric = made(4)
    scheme, lost = Scheme(group_size=-1), []
    for rounds in (2, 6):
        solved = Solved(hessian, CompensateOptions(refine=rounds))
        found = solved.quantize(weight, scheme, torch.float32, metric, rows.parts(N, K, HEAD))
        lost.append(rows.error(weight, hessian.matrix, metric, found))
    assert lost[1] < lost[0]


def test_coupling_loses_less_under_the_metric_than_rounding_rows_alone() -> None:
    for group_size in (8, -1):
        weight, hessian, metric = made(2)
        solved, scheme = Solved(hessian, CompensateOptions()), Scheme(group_size=group_size)
        alone = solved.quantize(weight, scheme, torch.float32)
        together = solved.quantize(weight, scheme, torch.float32, metric, rows.parts(N, K, HEAD))
        lost = [float(_error(weight, hessian.matrix, metric, each)) for each in (together, alone)]
        assert lost[0] < 0.8 * lost[1]


def test_a_metric_without_coupling_changes_nothing() -> None:
    weight, hessian, _ = made(3)
    solved, scheme = Solved(hessian, CompensateOptions(refine=0)), Scheme(group_size=8)
    plain = solved.quantize(weight, scheme, torch.float32)
    unit = solved.quantize(weight, scheme, torch.float32, torch.eye(N), rows.parts(N, K, HEAD))
    assert (plain.codes != unit.codes).float().mean() < 0.01  # products of other shapes sum in another order


def _error(weight: Tensor, matrix: Tensor, metric: Tensor, quantized: QuantizedWeight) -> Tensor:
    """tr(G D H D^T) in float64."""
    lost = quantized.dequantize().double() - weight.double()
    return torch.trace(metric.double() @ lost @ matrix.double() @ lost.T)
