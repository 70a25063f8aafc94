"""Folded groups on CPUs equal the reference bit for bit: every code path, few rows and many, dtypes, threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from qtoolkit.kernels import folded, ops, reference, selection
from qtoolkit.kernels.cpu import backend, library

pytestmark = pytest.mark.skipif(library.failure() is not None, reason=f"no CPU kernels here: {library.failure()}")
PATHS = () if library.failure() else tuple(library.load().paths)
DTYPES = tuple(library.DTYPES)
MANY = 43  # rows from which the AVX512 path unpacks panels, and a few


def layer(n: int, k: int, group_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return random packed codes, all 16 values, and scales that fold, with every multiple and a row of zeros."""
    draw = torch.Generator().manual_seed(seed)
    packed = torch.randint(-(2**31), 2**31 - 1, (n, -(-k // 8)), dtype=torch.int32, generator=draw)
    multiples = torch.randint(folded.LEAST, folded.MOST + 1, (n, -(-k // group_size)), generator=draw)
    bases = (torch.rand(n, 1, generator=draw) * 0.002).bfloat16().float()  # products with a multiple are exact
    bases[seed % n] = 0
    return packed, multiples * bases


def expected(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, group_size: int) -> Tensor:
    return folded.w4a8_linear(x, reference.unpack_int4(packed, x.shape[-1]), scales, bias, group_size)


def ours(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, group_size: int, path: str, gated: bool = False
) -> Tensor:
    n, k = packed.shape[0], x.shape[-1] // (2 if gated else 1)
    problem = selection.Problem(k, n, group_size, x.dtype, "cpu", selection.Grid.FOLDED)
    weight, own = backend.prepare_folded(packed, scales, problem)
    return backend.run(x, weight, own, bias, n, group_size, path, gated)


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert torch.equal(got.isnan(), want.isnan())
    integers = torch.int32 if got.dtype == torch.float32 else torch.int16
    finite = ~want.isnan()
    assert torch.equal(got[finite].view(integers), want[finite].view(integers))


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(0, 60),
    n=st.integers(1, 200),
    k=st.integers(1, 600),
    group_size=st.sampled_from([4, 12, 32, 64, 128, 1024]),
    dtype=st.sampled_from(DTYPES),
    biased=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_equals_the_reference(
    path: str, m: int, n: int, k: int, group_size: int, dtype: torch.dtype, biased: bool, seed: int
) -> None:
    packed, scales = layer(n, k, group_size, seed)
    draw = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(m, k, generator=draw).to(dtype)
    bias = torch.randn(n, generator=draw).to(dtype) if biased else None
    assert_same_bits(ours(x, packed, scales, bias, group_size, path), expected(x, packed, scales, bias, group_size))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("m", [1, 6, 7, 31, 32, MANY, 130, 521])  # one tile, several, unpacked, spans, blocks of rows
def test_thread_counts_and_row_tiles_change_nothing(path: str, group_size: int, m: int, threads: int) -> None:
    packed, scales = layer(600, 256, group_size, seed=m)  # enough panels that rows are not split between threads
    x = torch.randn(m, 256, generator=torch.Generator().manual_seed(m)).bfloat16()
    assert_same_bits(ours(x, packed, scales, None, group_size, path), expected(x, packed, scales, None, group_size))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("k", [2048, 4100, 9001])  # one, three and five blocks of unpacked inputs, whole and not
@pytest.mark.parametrize("m", [9, 20, MANY])  # in blocks of few groups (or one pass with AMX), unpacked
def test_many_inputs_are_added_block_by_block(path: str, k: int, m: int) -> None:
    packed, scales = layer(70, k, 96, seed=k)  # groups that blocks cut
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(k))
    assert_same_bits(ours(x, packed, scales, None, 96, path), expected(x, packed, scales, None, 96))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("m", [3, 11, MANY])
@pytest.mark.parametrize("nibble", [0, 7, 15])  # -8, -1, 7
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_neither_saturate_nor_wrap(path: str, m: int, nibble: int, sign: int) -> None:
    k = 131072 if path != "portable" else 16384  # 131072 * 128 * 127 is just below 2**31
    word = int.from_bytes(bytes([nibble * 17] * 4), "little", signed=True)
    packed = torch.full((2, k // 8), word, dtype=torch.int32)
    x = torch.full((m, k), sign * 3.0)  # every code is 127 or -127
    scales = torch.full((2, k // 128), float(folded.MOST))
    scales[:, 0] = 1.0  # or the multiples would all be 1
    assert_same_bits(ours(x, packed, scales, None, 128, path), expected(x, packed, scales, None, 128))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("m", [9, MANY])
def test_zero_rows_and_rows_with_nan_or_infinity(path: str, m: int) -> None:
    packed, scales = layer(70, 256, 64, seed=5)
    x = torch.randn(m, 256, generator=torch.Generator().manual_seed(6)).bfloat16()
    x[1], x[2] = 0, x[2] * 1e-30
    x[3, 17], x[4, 255], x[5, 0] = float("nan"), float("inf"), -float("inf")
    got = ours(x, packed, scales, None, 64, path)
    assert_same_bits(got, expected(x, packed, scales, None, 64))
    assert got[3:6].isnan().all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("m", [5, MANY])
@pytest.mark.parametrize("size", [2.0**-140, 2.0**120])  # float32 denormals, and sums that overflow
def test_extreme_bases(path: str, m: int, size: float) -> None:
    packed, _ = layer(64, 128, 32, seed=7)
    draw = torch.Generator().manual_seed(8)
    multiples = torch.randint(folded.LEAST, folded.MOST + 1, (64, 4), generator=draw)
    bases = torch.randint(1, 4, (64, 1), generator=draw)
    scales, x = multiples * (bases * size), torch.randn(m, 128, generator=draw)
    assert_same_bits(ours(x, packed, scales, None, 32, path), expected(x, packed, scales, None, 32))


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=20, deadline=None)
@given(m=st.integers(0, 60), k=st.integers(1, 300), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31))
def test_gate_and_up_equal_the_reference(path: str, m: int, k: int, dtype: torch.dtype, seed: int) -> None:
    packed, scales = layer(70, k, 32, seed)
    x = torch.randn(m, 2 * k, generator=torch.Generator().manual_seed(seed)).to(dtype)
    want = expected(reference.silu_and_mul(x), packed, scales, None, 32)
    assert_same_bits(ours(x, packed, scales, None, 32, path, gated=True), want)


def test_a_token_does_not_depend_on_its_batch() -> None:
    packed, scales = layer(128, 512, 128, seed=13)
    x = torch.randn(100, 512, generator=torch.Generator().manual_seed(14)).bfloat16()
    together = ours(x, packed, scales, None, 128, PATHS[0])
    parts = [ours(part, packed, scales, None, 128, PATHS[0]) for part in x.split([1, 30, 46, 23])]
    assert_same_bits(torch.cat(parts), together)


def test_selection_finds_them_and_the_operators_run_them() -> None:
    packed, scales = layer(200, 256, 128, seed=15)
    prepared = selection.prepare(packed, scales, selection.Problem(256, 200, 128, torch.bfloat16, "cpu"))
    assert (prepared.backend, prepared.layout) == ("cpu", backend.LAYOUT_FOLDED)
    x, bias = torch.randn(2, 25, 256).bfloat16(), torch.randn(200).bfloat16()
    rest = (prepared.weight, prepared.scales, bias, 200, 128, prepared.layout)
    want = expected(x, packed, scales, bias, 128)
    assert_same_bits(ops.w4a8_linear(x, *rest), want)
    assert_same_bits(torch.ops.qtoolkit.w4a8_linear(x, *rest), want)
    both = torch.cat([x, x.flip(0)], dim=-1)
    assert ops.fuses_gate(prepared.layout)
    want = expected(reference.silu_and_mul(both), packed, scales, bias, 128)
    assert_same_bits(ops.w4a8_gated_linear(both, *rest), want)


def test_what_does_not_fit_is_refused_in_words() -> None:
    packed, scales = layer(64, 256, 128, seed=20)
    problem = selection.Problem(256, 64, 128, torch.bfloat16, "cpu", selection.Grid.FOLDED)
    with pytest.raises(ValueError, match="no small multiples"):
        backend.prepare_folded(packed, torch.rand(64, 2), problem)
    many = selection.Problem(1 << 18, 64, 128, torch.bfloat16, "cpu", selection.Grid.FOLDED)
    assert "131072" in str(backend.refuse(many))
    weight, own = backend.prepare_folded(packed, scales, problem)
    x = torch.ones(1, 256)
    for run in (backend.run, torch.ops.qtoolkit.w4a8_linear_cpu):
        for wrong in (own[:, 4:], own.float(), own[:, 4:].half(), own.char()):
            with pytest.raises(ValueError, match="scales"):
                run(x, weight, wrong, None, 64, 128)
        with pytest.raises(ValueError, match="bias"):
            run(x, weight, own, torch.ones(64, dtype=torch.uint8), 64, 128)
