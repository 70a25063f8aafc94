"""bfloat16 layers on CPUs: close to float64 on every code path, the same bits in any batch and on any thread count."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from qtoolkit.kernels.cpu import bfloat16, library

pytestmark = pytest.mark.skipif(library.failure() is not None, reason=f"no CPU kernels here: {library.failure()}")
PATHS = () if library.failure() else tuple(bfloat16.paths())


def layer(n: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return a random weight [n, k] and bias [n]."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=draw).bfloat16(), torch.randn(n, generator=draw).bfloat16()


def tokens(m: int, k: int, seed: int) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).bfloat16()


def run(x: Tensor, weight: Tensor, bias: Tensor | None, path: str | None = None) -> Tensor:
    return bfloat16.run(x, bfloat16.prepare(weight), bias, weight.shape[0], path)


def assert_close(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Demand float32 sums that are rounded once: half a bfloat16 step, and k roundings of partial sums before."""
    want = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    sums = x.double().abs() @ weight.double().abs().t() + (0 if bias is None else bias.double().abs())
    assert (got.dtype, got.shape) == (torch.bfloat16, want.shape)
    assert ((got.double() - want).abs() <= want.abs() * 2**-8 + sums * (x.shape[-1] + 1) * 2**-23 + 1e-38).all()


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(0, 17), n=st.integers(1, 150), k=st.integers(0, 300), biased=st.booleans(), seed=st.integers(0, 99)
)
def test_any_shape_is_close_to_float64(path: str, m: int, n: int, k: int, biased: bool, seed: int) -> None:
    weight, bias = layer(n, k, seed)
    x = tokens(m, k, seed + 1)
    own_bias = bias if biased else None
    assert_close(run(x, weight, own_bias, path), x, weight, own_bias)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("m", [1, 6, 16, 100])  # one tile, several, more than one call's tokens
def test_several_tasks_on_any_number_of_threads(path: str, m: int, threads: int) -> None:
    weight, bias = layer(500, 2100, 3)
    x = tokens(m, 2100, 4)
    assert_close(run(x, weight, bias, path), x, weight, bias)


@pytest.mark.parametrize("path", PATHS)
def test_a_token_does_not_depend_on_its_batch(path: str) -> None:
    weight, bias = layer(307, 1000, 5)
    x = tokens(23, 1000, 6)
    together = run(x, weight, bias, path)
    parts = [run(part, weight, bias, path) for part in x.split([1, 2, 3, 4, 13])]
    assert torch.equal(torch.cat(parts), together)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("m", [1, 5])
def test_nan_and_infinity_pass_through_and_stay_in_their_place(path: str, m: int) -> None:
    weight, _ = layer(70, 130, 7)
    x = tokens(m, 130, 8)
    clean = run(x, weight, None, path)
    weight[3, 129], weight[8, 0], weight[69, 64] = torch.nan, torch.inf, -torch.inf
    got = run(x, weight, None, path)
    assert got[:, 3].isnan().all()
    assert torch.equal(got[:, 8].float(), x[:, 0].float() * torch.inf)
    assert torch.equal(got[:, 69].float(), x[:, 64].float() * -torch.inf)
    rest = [i for i in range(70) if i not in (3, 8, 69)]
    assert torch.equal(got[:, rest], clean[:, rest])
    x[m - 1, 0] = torch.nan
    got = run(x, weight, None, path)
    assert got[m - 1].isnan().all()
    assert torch.equal(got[: m - 1, rest], clean[: m - 1, rest])


@pytest.mark.parametrize("path", PATHS)
def test_results_round_to_the_nearest_even(path: str) -> None:
    steps = torch.tensor([[1.0, 2.0**-8, 0], [1.0, 2.0**-8, 2.0**-20], [1.0, 3 * 2.0**-8, 0], [-1.0, -(2.0**-8), 0]])
    got = run(torch.ones(1, 3).bfloat16(), steps.bfloat16(), None, path)
    assert got.tolist() == [[1.0, 1 + 2.0**-7, 1 + 2.0**-6, -1.0]]


@pytest.mark.parametrize("path", PATHS)
def test_rows_may_lie_apart(path: str) -> None:
    weight, bias = layer(64, 96, 9)
    wide = tokens(33, 300, 10).view(11, 3, 300)
    for x in (wide[:, 1, 20:116], wide[..., :96], wide.transpose(0, 1)[..., 4:100], wide[:0, 0, :96], wide[0, 0, :96]):
        got = run(x, weight, bias, path)
        assert torch.equal(got, run(x.contiguous(), weight, bias, path))


def test_the_operator_runs_it_and_torch_compile_keeps_it_whole() -> None:
    weight, bias = layer(100, 256, 11)
    x, own = tokens(6, 256, 12).view(2, 3, 256), bfloat16.prepare(weight)
    want = 2 * run(x, weight, bias)

    def twice(x: Tensor) -> Tensor:
        return 2 * bfloat16.linear(x, own, bias, 100)

    assert torch.equal(twice(x), want)
    assert torch.equal(torch.compile(twice, backend="aot_eager", fullgraph=True, dynamic=True)(x), want)


def test_a_weight_that_is_not_contiguous_is_packed_as_one_that_is() -> None:
    weight, _ = layer(70, 33, 15)
    wide = torch.cat([weight, weight], dim=1)
    assert torch.equal(bfloat16.prepare(wide[:, 33:]), bfloat16.prepare(weight))


def test_what_does_not_fit_is_refused_in_words() -> None:
    weight, bias = layer(64, 96, 13)
    assert bfloat16.refuse(torch.bfloat16, "cpu") is None
    assert "torch.float32" in str(bfloat16.refuse(torch.float32, "cpu"))
    assert "CPUs only" in str(bfloat16.refuse(torch.bfloat16, "cuda"))
    for wrong in (weight.float(), weight[0]):
        with pytest.raises(ValueError, match="not bfloat16"):
            bfloat16.prepare(wrong)
    x, own = tokens(2, 96, 14), bfloat16.prepare(weight)
    for wrong in (x.float(), x[0, 0]):
        with pytest.raises(ValueError, match="x must be bfloat16"):
            bfloat16.run(wrong, own, None, 64)
    for wrong in (own.float(), own[:, 1:], weight):
        with pytest.raises(ValueError, match="is not that of 96 inputs and 64 outputs"):
            bfloat16.run(x, wrong, None, 64)
    for wrong in (bias.float(), bias[1:]):
        with pytest.raises(ValueError, match="bias must be bfloat16"):
            bfloat16.run(x, own, wrong, 64)


@pytest.mark.parametrize(("forced", "expected"), [("avx2", "['avx2']"), ("portable", "needs AVX2 at least")])
def test_the_variable_that_forces_a_path_holds_here_too(forced: str, expected: str) -> None:
    if forced not in library.load().paths:
        pytest.skip(f"this CPU has no {forced}")
    code = """
import torch
from qtoolkit.kernels.cpu import bfloat16
print(bfloat16.refuse(torch.bfloat16, "cpu") or list(bfloat16.paths()))
"""
    environment = {**os.environ, library.PATH_VARIABLE: forced}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
