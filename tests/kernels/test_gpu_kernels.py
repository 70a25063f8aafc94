"""The GPU kernels on a GPU: every tiling and operator against float64, under torch.compile and in CUDA graphs."""

import pytest
import torch

from qtoolkit.evals.gpu_bench import correctness
from qtoolkit.evals.gpu_bench.contenders import random_weight
from qtoolkit.kernels import ops, selection
from qtoolkit.kernels.selection import Grid, Problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_the_operator_agrees_with_float64_and_with_itself(name: str) -> None:
    outcomes = {case.what: case.run() for case in correctness.operators((name,), "cuda", 1)}
    run = {what: outcome for what, outcome in outcomes.items() if "refused" not in outcome}
    if not run:
        pytest.skip(f"this card has no {name} backend")
    assert not [what for what, outcome in run.items() if not outcome["right"]]


def test_every_tiling_agrees_with_float64() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("these kernels are for Hopper")
    assert not [case.what for case in correctness.tilings("cuda", 2) if not case.run()["right"]]


def layer(n: int = 1024, k: int = 2048, group_size: int = 128, grid: Grid = Grid.PLAIN) -> selection.Prepared:
    weight = random_weight(n, k, group_size, "cuda", fold=grid is Grid.FOLDED)
    asked = Grid.CHAINED if grid is Grid.CHAINED else Grid.PLAIN  # that groups fold is found in their scales
    problem = Problem(k, n, group_size, torch.bfloat16, "cuda", asked)
    return selection.prepare(weight.packed(), weight.scales, problem)


@pytest.mark.parametrize("grid", Grid)
@pytest.mark.parametrize("tokens", [1, 16, 40])  # on Hopper: one launch, one launch, two
def test_a_graph_replays_new_tokens(tokens: int, grid: Grid) -> None:
    own = layer(grid=grid)
    x = torch.randn(tokens, 2048, device="cuda").bfloat16()
    ops.w4a8_linear(x, own.weight, own.scales, None, 1024, 128, own.layout)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.w4a8_linear(x, own.weight, own.scales, None, 1024, 128, own.layout)
    for seed in range(3):
        x.copy_(torch.randn(tokens, 2048, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert torch.equal(out, ops.w4a8_linear(x, own.weight, own.scales, None, 1024, 128, own.layout))


def test_compiled_code_calls_the_operator_without_a_break() -> None:
    own = layer()

    def block(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(ops.w4a8_linear(x * 2, own.weight, own.scales, None, 1024, 128, own.layout))

    x = torch.randn(5, 2048, device="cuda").bfloat16()
    assert torch.equal(torch.compile(block, fullgraph=True)(x), block(x))


def test_two_streams_do_not_disturb_each_other() -> None:
    own = layer(4096, 4096)
    tokens = [torch.randn(m, 4096, device="cuda").bfloat16() for m in (3, 40)]
    want = [ops.w4a8_linear(x, own.weight, own.scales, None, 4096, 128, own.layout) for x in tokens]
    streams = [torch.cuda.Stream() for _ in tokens]
    torch.cuda.synchronize()
    for _ in range(20):
        got = []
        for x, stream in zip(tokens, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(ops.w4a8_linear(x, own.weight, own.scales, None, 4096, 128, own.layout))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
