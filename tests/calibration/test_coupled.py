"""Rounding under a metric of the outputs: against float64 loops, and the metric against the exact Jacobian."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests_support import save_random
from torch import Tensor

from qtoolkit import architecture
from qtoolkit.calibration import capture, coupled, grid, outputs
from qtoolkit.calibration.compensation import CompensateOptions, Solved
from qtoolkit.calibration.hessian import Hessian
from qtoolkit.scheme import Scheme
from qtoolkit.source import resolve
from qtoolkit.stages import QuantizedWeight, Stream

HEADS, SIZE, K = 3, 4, 40


def made(seed: int = 0) -> tuple[Tensor, Hessian, Tensor]:
    """Return a weight, its Hessian and a metric with strong coupling inside the heads."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(200, K, generator=draw) @ torch.randn(K, K, generator=draw)
    hessian = Hessian(K)
    hessian.update(x)
    root = torch.randn(HEADS, 2, SIZE, generator=draw)
    metric = root.transpose(1, 2) @ root + 0.1 * torch.eye(SIZE)
    return torch.randn(HEADS * SIZE, K, generator=draw), hessian, metric


def whole(metric: Tensor) -> Tensor:
    return torch.block_diag(*metric.double())


def test_codes_are_those_of_eliminating_both_sides_in_float64() -> None:
    """Each entry in turn, and the exact least-squares answer of its column's later rows, then of the later columns."""
    weight, hessian, metric = made()
    scheme = Scheme(group_size=-1)
    solved = Solved(hessian, CompensateOptions(refine=0, activation_order=False))
    found = solved.quantize(weight, scheme, torch.float32, metric)
    b, h = whole(metric), hessian.damped(0.01).double()
    scales, w = found.scales.double().flatten(), weight.double().clone()
    codes = torch.zeros_like(w)
    for j in range(K):
        column = w[:, j].clone()
        for r in range(HEADS * SIZE):
            codes[r, j] = (column[r] / scales[r]).round().clamp(-8, 7)
            later = list(range(r, HEADS * SIZE))
            inverse = torch.linalg.inv(b[later][:, later])
            column[later] -= inverse[:, 0] / inverse[0, 0] * (column[r] - codes[r, j] * scales[r])
        rest = list(range(j, K))
        inverse = torch.linalg.inv(h[rest][:, rest])
        w[:, rest] -= torch.outer(w[:, j] - codes[:, j] * scales, inverse[0] / inverse[0, 0])
    assert (found.codes != codes.to(torch.int8)).float().mean() < 0.01  # near ties may fall either way in fp32


def test_descending_is_a_slow_loop_in_float64_and_never_raises_the_error() -> None:
    weight, hessian, metric = made(1)
    scheme, matrix = Scheme(group_size=8), hessian.damped(0.01)
    scales = grid.minmax_scales(weight, scheme, torch.bfloat16)
    before = QuantizedWeight(grid.to_codes(weight, scales, scheme), scales)
    found = QuantizedWeight(coupled.descend(weight, matrix, metric, before, scheme), scales)
    b, h, w = whole(metric), matrix.double(), weight.double()
    steps = scales.double().repeat_interleave(8, dim=1)
    codes = before.codes.double()
    for j, r in itertools.product(range(K), range(HEADS * SIZE)):
        slope = float((b[r] @ (codes * steps - w)) @ h[:, j])
        codes[r, j] = (codes[r, j] - slope / (steps[r, j] * b[r, r] * h[j, j])).round().clamp(-8, 7)
    assert (found.codes != codes.to(torch.int8)).float().mean() < 0.02
    old = coupled.errors(weight, matrix, metric, before)
    assert (coupled.errors(weight, matrix, metric, found) < old).all()
    after = coupled.refined(weight, matrix, metric, before, scheme, rounds=3)
    assert (coupled.errors(weight, matrix, metric, after) <= old).all()


def test_coupling_loses_less_under_the_metric_than_rounding_rows_alone() -> None:
    weight, hessian, metric = made(2)
    solved, scheme = Solved(hessian, CompensateOptions()), Scheme(group_size=-1)
    lost = [
        float(coupled.errors(weight, hessian.matrix, metric, solved.quantize(weight, scheme, torch.float32, m)).sum())
        for m in (metric, None)
    ]
    assert lost[0] < 0.8 * lost[1]


def test_a_metric_without_coupling_changes_nothing() -> None:
    weight, hessian, _ = made(3)
    solved, scheme = Solved(hessian, CompensateOptions(refine=0)), Scheme(group_size=8)
    plain = solved.quantize(weight, scheme, torch.float32)
    unit = solved.quantize(weight, scheme, torch.float32, torch.eye(SIZE).repeat(HEADS, 1, 1))
    assert torch.equal(plain.codes, unit.codes)


def test_the_metric_is_the_jacobian_s_gram_matrix(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = save_random(tmp_path_factory.mktemp("m") / "llama", hidden_size=32, intermediate_size=32, head_dim=8)
    source = resolve(folder)
    skeleton = architecture.skeleton(source)
    block = skeleton.block(0, source)
    stream = capture.embed(skeleton, source, torch.randint(2, 258, (1, 6), generator=torch.Generator().manual_seed(1)))
    many = Stream([stream.batches[0].repeat(1000, 1, 1)], stream.kwargs)  # a thousand probes of the same six tokens
    found = outputs.metrics(block, many)
    assert set(found) == {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}

    layer = block.linear("self_attn.k_proj")
    hidden, kwargs = stream.batches[0].clone(), outputs._cloned(stream.kwargs[0])  # made in inference mode
    start = layer(block.layer("input_layernorm")(hidden)).detach()

    def behind(keys: Tensor) -> Tensor:
        handle = layer.register_forward_hook(lambda module, args, out: keys)
        out = block.module(hidden, **kwargs)
        handle.remove()
        return out[0] if isinstance(out, tuple) else out

    jacobian = torch.autograd.functional.jacobian(behind, start.clone()).reshape(-1, 6, 2, 8)  # [out, token, head, dim]
    gram = torch.einsum("othi,othj->hij", jacobian, jacobian)
    mean = gram.diagonal(dim1=1, dim2=2).mean(dim=1).view(-1, 1, 1)
    expected = gram / mean + outputs.DAMPING * torch.eye(8)
    # a thousand random probes: each entry is known to about 1 / sqrt(1000) of the diagonal's size
    torch.testing.assert_close(found["self_attn.k_proj"], expected, rtol=0.15, atol=0.15)


def test_the_metric_can_be_taken_inside_inference_mode_and_repeats(tmp_path_factory: pytest.TempPathFactory) -> None:
    source = resolve(save_random(tmp_path_factory.mktemp("m") / "qwen3", "qwen3"))
    skeleton = architecture.skeleton(source)
    with torch.inference_mode():
        block = skeleton.block(0, source)
        tokens = torch.randint(2, 258, (3, 16), generator=torch.Generator().manual_seed(1))
        stream = capture.embed(skeleton, source, tokens)
        once, again = outputs.metrics(block, stream), outputs.metrics(block, stream)
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert len(once) == 3
