"""The C++ product equals the reference bit for bit: every code path, shape, scale layout, dtype and thread count."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from qtoolkit.kernels import ops, reference, selection
from qtoolkit.kernels.cpu import backend, library

pytestmark = pytest.mark.skipif(library.failure() is not None, reason=f"no CPU kernels here: {library.failure()}")
PATHS = () if library.failure() else tuple(library.load().paths)
DTYPES = tuple(library.DTYPES)


def layer(
    n: int, k: int, group_size: int, seed: int, scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return random packed codes, all 16 values, and scales of one layer."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(-(2**31), 2**31 - 1, (n, -(-k // 8)), dtype=torch.int32, generator=generator)
    groups = 1 if group_size == -1 else -(-k // group_size)
    return packed, (torch.rand(n, groups, generator=generator) * 0.02).to(scale_dtype)


def expected(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, group_size: int) -> Tensor:
    return reference.w4a8_linear(x, reference.unpack_int4(packed, x.shape[-1]), scales, bias, group_size)


def ours(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, group_size: int, path: str) -> Tensor:
    n, k = packed.shape[0], x.shape[-1]
    problem = selection.Problem(k, n, group_size, x.dtype, "cpu")
    weight, own_scales = backend.prepare(packed, scales, problem)
    return backend.run(x, weight, own_scales, bias, n, group_size, path=path)


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    integers = torch.int32 if got.dtype == torch.float32 else torch.int16
    finite = ~want.isnan()
    assert torch.equal(got[finite].view(integers), want[finite].view(integers))


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(0, 40),
    n=st.integers(1, 200),
    k=st.integers(1, 600),
    group_size=st.sampled_from([-1, 32, 64, 128]),
    dtype=st.sampled_from(DTYPES),
    scale_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    biased=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_equals_the_reference(
    path: str,
    m: int,
    n: int,
    k: int,
    group_size: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    biased: bool,
    seed: int,
) -> None:
    packed, scales = layer(n, k, group_size, seed, scale_dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(m, k, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype) if biased else None
    assert_same_bits(ours(x, packed, scales, bias, group_size, path), expected(x, packed, scales, bias, group_size))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("group_size", [-1, 128])
@pytest.mark.parametrize("m", [1, 3, 6, 7, 13, 24, 521])  # one tile, uneven tiles, more than one block of rows
def test_thread_counts_and_row_tiles_change_nothing(path: str, group_size: int, m: int, threads: int) -> None:
    packed, scales = layer(200, 768, group_size, seed=m)
    x = torch.randn(m, 768, generator=torch.Generator().manual_seed(m)).bfloat16()
    assert_same_bits(ours(x, packed, scales, None, group_size, path), expected(x, packed, scales, None, group_size))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("m", [3, 7, 40])
@pytest.mark.parametrize("nibble", [0, 7, 15])  # -8, -1, 7
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_neither_saturate_nor_wrap(path: str, m: int, nibble: int, sign: int) -> None:
    k = backend.MOST_SUMMED if path != "portable" else 16384
    word = int.from_bytes(bytes([nibble * 17] * 4), "little", signed=True)
    packed = torch.full((20, k // 8), word, dtype=torch.int32)
    x = torch.full((m, k), sign * 3.0)  # every code is 127 or -127
    scales = torch.ones(20, 1)
    assert_same_bits(ours(x, packed, scales, None, -1, path), expected(x, packed, scales, None, -1))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_rows_tiny_rows_and_rows_with_nan_or_infinity(path: str, dtype: torch.dtype) -> None:
    packed, scales = layer(70, 256, 64, seed=5)
    x = torch.randn(9, 256, generator=torch.Generator().manual_seed(6)).to(dtype)
    x[1], x[2] = 0, x[2] * 1e-30
    x[3, 17], x[4, 255], x[5, 0] = float("nan"), float("inf"), -float("inf")
    x[6, 0] = torch.finfo(dtype).max
    x[7] = torch.finfo(dtype).smallest_normal
    got = ours(x, packed, scales, None, 64, path)
    assert_same_bits(got, expected(x, packed, scales, None, 64))
    assert got[3:6].isnan().all()
    assert not got[0].isnan().any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [1e-40, 1e-45, 1e30])  # float32 denormals, and sums far beyond fp16
def test_extreme_scales(path: str, size: float) -> None:
    packed, scales = layer(64, 128, 32, seed=7)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(8))
    scales = scales * 50 * size
    assert_same_bits(ours(x, packed, scales, None, 32, path), expected(x, packed, scales, None, 32))


@pytest.mark.parametrize("path", PATHS)
def test_rows_may_lie_apart(path: str) -> None:
    packed, scales = layer(96, 160, 32, seed=9)
    wide = torch.randn(11, 3, 200, generator=torch.Generator().manual_seed(10)).bfloat16()
    for x in (wide[:, 1, 20:180], wide[..., :160], wide.transpose(0, 1)[..., 40:]):
        assert_same_bits(ours(x, packed, scales, None, 32, path), expected(x, packed, scales, None, 32))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("group_size", [-1, 32, 96, 512])
@pytest.mark.parametrize("m", [7, 16, 20, 36, 37])  # two tiles (AMX: one), several, the most in blocks, one more
def test_many_inputs_are_added_block_by_block(path: str, group_size: int, m: int, threads: int) -> None:
    k = 6150  # inputs of a panel that is not one block even per channel; neither whole groups nor whole steps
    packed, scales = layer(70, k, group_size, seed=m)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).bfloat16()
    assert_same_bits(ours(x, packed, scales, None, group_size, path), expected(x, packed, scales, None, group_size))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("group_size", [-1, 64, 96, 128, 256, 512])  # one tile of inputs a group, several, part of one
@pytest.mark.parametrize("m", [7, 16, 17, 64, 65, 100, 300])  # one tile, few rows, many, uneven tiles, several blocks
def test_many_rows_share_panels(path: str, group_size: int, m: int, threads: int) -> None:
    k, n = 904, 1100  # the last span of panels, the last panel and the last group are smaller than the others
    packed, scales = layer(n, k, group_size, seed=m, scale_dtype=torch.float32 if m % 2 else torch.bfloat16)
    draw = torch.Generator().manual_seed(m)
    x, bias = torch.randn(m, k, generator=draw).bfloat16(), torch.randn(n, generator=draw)
    x[5], x[m - 1, 3] = 0, torch.nan
    assert_same_bits(ours(x, packed, scales, bias, group_size, path), expected(x, packed, scales, bias, group_size))


def test_a_layer_without_inputs_is_refused() -> None:
    packed, scales = layer(70, 0, -1, seed=0)
    weight, own = backend.prepare(packed, scales, selection.Problem(0, 70, -1, torch.float32, "cpu"))
    for run in (backend.run, torch.ops.qtoolkit.w4a8_linear_cpu):
        with pytest.raises(ValueError, match="a layer needs inputs"):
            run(torch.ones(3, 0), weight, own, None, 70, -1)


def test_two_runs_give_the_same_bits() -> None:
    packed, scales = layer(320, 1024, 128, seed=11)
    x = torch.randn(33, 1024, generator=torch.Generator().manual_seed(12)).bfloat16()
    assert_same_bits(ours(x, packed, scales, None, 128, PATHS[0]), ours(x, packed, scales, None, 128, PATHS[0]))


def test_a_token_does_not_depend_on_its_batch() -> None:
    packed, scales = layer(128, 512, 128, seed=13)
    x = torch.randn(23, 512, generator=torch.Generator().manual_seed(14)).bfloat16()
    together = ours(x, packed, scales, None, 128, PATHS[0])
    assert_same_bits(torch.cat([ours(row[None], packed, scales, None, 128, PATHS[0]) for row in x]), together)


@pytest.mark.parametrize("direct", [True, False])
def test_the_operator_equals_the_reference_for_any_strides(direct: bool) -> None:
    packed, scales = layer(100, 96, 32, seed=17)
    problem = selection.Problem(96, 100, 32, torch.float32, "cpu")
    prepared = selection.prepare(packed, scales, problem)
    wide = torch.randn(5, 3, 200, generator=torch.Generator().manual_seed(18))
    bias = torch.randn(200, generator=torch.Generator().manual_seed(19))
    for x in (wide[..., :96], wide.transpose(0, 1)[..., 4:100], wide[:, 0, 20:116], wide[0, 0, :96], wide[:0, :, :96]):
        for own_bias in (None, bias[:100], bias[::2]):
            arguments = (x, prepared.weight, prepared.scales, own_bias, 100, 32)
            if direct:
                got = torch.ops.qtoolkit.w4a8_linear_cpu(*arguments)
            else:
                got = torch.ops.qtoolkit.w4a8_linear(*arguments, prepared.layout)
            assert_same_bits(got, expected(x, packed, scales, own_bias, 32))


def test_the_operator_refuses_tensors_of_another_shape() -> None:
    packed, scales = layer(64, 256, 128, seed=20)
    p = selection.prepare(packed, scales, selection.Problem(256, 64, 128, torch.bfloat16, "cpu"))
    run = torch.ops.qtoolkit.w4a8_linear_cpu
    x = torch.ones(1, 256)
    with pytest.raises(ValueError, match="260 inputs"):
        run(torch.ones(1, 260), p.weight, p.scales, None, 64, 128)
    with pytest.raises(ValueError, match="65 outputs"):
        run(x, p.weight, p.scales, None, 65, 128)
    for group_size in (0, -2, 130):
        with pytest.raises(ValueError, match=f"groups of {group_size}"):
            run(x, p.weight, p.scales, None, 64, group_size)
    with pytest.raises(ValueError, match="bias"):
        run(x, p.weight, p.scales, torch.ones(63), 64, 128)
    with pytest.raises(ValueError, match="floating point"):
        run(x.double(), p.weight, p.scales, None, 64, 128)


def test_the_operator_runs_it_and_torch_compile_keeps_it_whole() -> None:
    packed, scales = layer(100, 256, 128, seed=15)
    prepared = selection.prepare(packed, scales, selection.Problem(256, 100, 128, torch.bfloat16, "cpu"))
    assert prepared.backend == "cpu"
    x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(16)).bfloat16()

    def twice(x: Tensor) -> Tensor:
        return 2 * ops.w4a8_linear(x, prepared.weight, prepared.scales, None, 100, 128, prepared.layout)

    want = 2 * expected(x, packed, scales, None, 128)
    assert_same_bits(twice(x), want)
    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True, dynamic=True)
    assert_same_bits(compiled(x), want)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(0, 40),
    k=st.integers(1, 600),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_gate_and_up_equal_the_reference(path: str, m: int, k: int, dtype: torch.dtype, size: float, seed: int) -> None:
    packed, scales = layer(70, k, -1, seed)
    x = (torch.randn(m, 2 * k, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)
    if m > 3:
        x[0], x[1, 0], x[2, -1] = 0, torch.nan, torch.inf
    weight, own_scales = backend.prepare(packed, scales, selection.Problem(k, 70, -1, dtype, "cpu"))
    want = expected(reference.silu_and_mul(x), packed, scales, None, -1)
    assert_same_bits(backend.run(x, weight, own_scales, None, 70, -1, path=path, gated=True), want)


def test_the_gated_operator_is_the_gated_product(threads: int) -> None:
    packed, scales = layer(200, 256, 128, 0)
    weight, own_scales = backend.prepare(packed, scales, selection.Problem(256, 200, 128, torch.bfloat16, "cpu"))
    x, bias = torch.randn(2, 5, 512).bfloat16(), torch.randn(200).bfloat16()
    operator = torch.ops.qtoolkit.w4a8_gated_linear_cpu
    want = expected(reference.silu_and_mul(x), packed, scales, bias, 128)
    assert_same_bits(operator(x, weight, own_scales, bias, 200, 128), want)
    assert_same_bits(operator(x.transpose(0, 1), weight, own_scales, bias, 200, 128), want.transpose(0, 1).contiguous())
    with pytest.raises(Exception, match="same size"):
        operator(x[..., 1:], weight, own_scales, bias, 200, 128)


def test_silu_and_mul_is_silu_times_up() -> None:
    x = torch.randn(100, 512) * 10
    gate, up = x.double().chunk(2, -1)
    want = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(reference.silu_and_mul(x).double(), want, rtol=1e-6, atol=1e-30)  # a few fp32 roundings
