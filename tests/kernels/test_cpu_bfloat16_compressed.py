"""Compressed bfloat16 layers on CPUs: on every code path the bits that the plain layout gives, for any weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from qtoolkit.kernels.cpu import bfloat16, bfloat16_compressed, library

pytestmark = pytest.mark.skipif(library.failure() is not None, reason=f"no CPU kernels here: {library.failure()}")
PATHS = () if library.failure() else tuple(bfloat16.paths())


def weights(n: int, k: int, seed: int, spread: float = 0.0) -> Tensor:
    """Return normal weights [n, k], a share ``spread`` of them with any bits: NaN, infinities and denormals too."""
    draw = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**15), 2**15, (n, k), dtype=torch.int16, generator=draw)
    normal = torch.randn(n, k, generator=draw).bfloat16()
    return torch.where(torch.rand(n, k, generator=draw) < spread, bits.view(torch.bfloat16), normal)


def tokens(m: int, k: int, seed: int) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).bfloat16()


def compressed(weight: Tensor) -> bfloat16_compressed.Compressed:
    """Compress a weight, however many of its values fit no table."""
    made = bfloat16_compressed.compress(weight, most_rest=1.0)
    assert made is not None
    return made


def run(x: Tensor, own: bfloat16_compressed.Compressed, bias: Tensor | None, n: int, path: str | None = None) -> Tensor:
    return bfloat16_compressed.run(x, own.weight, own.tables, own.starts, own.rest, bias, n, path)


def assert_as_plain(x: Tensor, weight: Tensor, bias: Tensor | None, path: str) -> None:
    n = weight.shape[0]
    got, want = (
        run(x, compressed(weight), bias, n, path),
        bfloat16.run(x, bfloat16.prepare(weight), bias, n, path),
    )
    assert torch.equal(got.view(torch.int16), want.view(torch.int16))  # as bits: NaN too


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(0, 17),
    n=st.integers(1, 150),
    k=st.integers(0, 300),
    spread=st.sampled_from([0.0, 0.001, 0.02, 1.0]),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_gives_the_bits_of_the_plain_layout(
    path: str, m: int, n: int, k: int, spread: float, biased: bool, seed: int
) -> None:
    assert_as_plain(tokens(m, k, seed), weights(n, k, seed, spread), tokens(1, n, seed)[0] if biased else None, path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("m", [1, 4, 6, 16, 100])  # one tile, several, more than one call's tokens
def test_several_tasks_on_any_number_of_threads(path: str, m: int, threads: int) -> None:
    assert_as_plain(tokens(m, 2100, 4), weights(500, 2100, 3, 0.0005), None, path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "inputs",
    [[0], [1], [699], [127, 128], [126, 127], [128, 129, 130, 131], [0, 1, 127, 255, 256, 698, 699], range(700), []],
    ids=str,
)
def test_values_in_no_table_may_lie_anywhere(path: str, inputs: list[int]) -> None:
    weight = weights(130, 700, 1)
    odd = torch.tensor([2.0**-100, -(2.0**-60), 2.0**90, 2.0**-40, -(2.0**70)]).bfloat16()
    for i in inputs:
        weight[(7 * i) % 130, i], weight[(11 * i + 5) % 130, i] = odd[i % 5], odd[(i + 1) % 5]
    for m in (1, 3, 13):
        assert_as_plain(tokens(m, 700, m), weight, None, path)


@pytest.mark.parametrize("path", PATHS)
def test_special_values_are_restored(path: str) -> None:
    weight = weights(64, 64, 2)
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 2.0**-133, -(2.0**-130), 1.5 * 2.0**127, 2.0**-126]
    for i, value in enumerate(special):
        weight[i, 2 * i + 1] = value
    one_hot = torch.eye(64).bfloat16()
    got = run(one_hot, compressed(weight), None, 64, path)  # [input, channel]
    for i, value in enumerate(special):
        rest = [j for j in range(64) if j != 2 * i + 1]
        if abs(value) < torch.inf:
            assert got[2 * i + 1, i] in (value, 0 if abs(value) < 2.0**-126 else value)  # AVX512 takes denormals for 0
            assert torch.equal(got[rest, i], weight[i, rest])
        else:  # times zero it is NaN everywhere else
            assert got[:, i].isnan().sum() == 64 - (value == value)


def test_it_takes_12_bits_a_weight_and_all_weights_come_back() -> None:
    weight = weights(192, 256, 5)
    own = compressed(weight)
    assert own.weight.numel() * 8 == weight.numel() * 12
    assert own.rest.numel() < 0.001 * weight.numel()
    assert torch.equal(run(torch.eye(256).bfloat16(), own, None, 192).t(), weight)


def test_a_weight_with_too_many_exponents_is_not_compressed() -> None:
    assert bfloat16_compressed.compress(weights(128, 128, 6)) is not None
    assert bfloat16_compressed.compress(weights(128, 128, 6, 0.01)) is None
    with pytest.raises(ValueError, match="not bfloat16"):
        bfloat16_compressed.compress(torch.zeros(3, 3))


def test_a_weight_that_is_not_contiguous_is_compressed_as_one_that_is() -> None:
    wide = weights(70, 66, 7)
    own, want = compressed(wide[:, 33:]), compressed(wide[:, 33:].contiguous())
    assert torch.equal(own.weight, want.weight)
    assert torch.equal(own.rest, want.rest)


def test_the_operator_runs_it_and_torch_compile_keeps_it_whole() -> None:
    weight, bias = weights(100, 256, 11), tokens(1, 100, 13)[0]
    x, own = tokens(6, 256, 12).view(2, 3, 256), compressed(weight)
    want = 2 * bfloat16.run(x, bfloat16.prepare(weight), bias, 100)

    def twice(x: Tensor) -> Tensor:
        return 2 * bfloat16_compressed.linear(x, own, bias, 100)

    assert torch.equal(twice(x), want)
    assert torch.equal(torch.compile(twice, backend="aot_eager", fullgraph=True, dynamic=True)(x), want)


def test_what_does_not_fit_is_refused_in_words() -> None:
    x, own = tokens(2, 96, 14), compressed(weights(64, 96, 13, 0.01))
    parts = (own.weight, own.tables, own.starts, own.rest)
    for at, name in enumerate(("weight", "tables", "starts", "rest")):
        for wrong in (parts[at].float(), parts[at][1:]):
            with pytest.raises(ValueError, match=f"{name} is torch"):
                bfloat16_compressed.run(x, *(*parts[:at], wrong, *parts[at + 1 :]), None, 64)
    with pytest.raises(ValueError, match="x must be bfloat16"):
        run(x.float(), own, None, 64)
