"""Binary kernels equal the reference bit for bit, sparse ones but for rounding: every path, shape and thread count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.nn import functional as F

from qtoolkit.kernels import vision_layout as layout, vision_ops as ops, vision_reference as reference
from qtoolkit.kernels.cpu.vision import backend, library

pytestmark = pytest.mark.skipif(library.failure() is not None, reason=f"no vision kernels here: {library.failure()}")
PATHS = () if library.failure() else tuple(library.load().paths)


@dataclass(frozen=True)
class Shape:
    """A convolution and its images; ``geometry`` is what the operators take behind the weights."""

    images: int
    channels: int
    n: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def k(self) -> int:
        return self.taps * self.channels

    @property
    def geometry(self) -> tuple[tuple[int, int], ...]:
        return self.kernel, self.stride, self.padding, self.dilation

    def fits(self) -> bool:
        return all(self.size[i] + 2 * self.padding[i] > self.dilation[i] * (self.kernel[i] - 1) for i in range(2))


def pairs(least: int, most: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(least, most), st.integers(least, most))


shapes = st.builds(
    Shape,
    images=st.integers(0, 3),
    channels=st.integers(1, 70),
    n=st.integers(1, 24),
    size=pairs(1, 20),
    kernel=pairs(1, 4),
    stride=pairs(1, 3),
    padding=pairs(0, 3),
    dilation=pairs(1, 3),
).filter(Shape.fits)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def binary_case(shape: Shape, seed: int) -> tuple[Any, ...]:
    """Return x with exact zeros of both signs, words, ones and scale of a random binary convolution."""
    x = noise(seed, shape.images, shape.channels, *shape.size)
    x[noise(seed + 1, *x.shape) > 1] = 0.0
    x[noise(seed + 2, *x.shape) > 1] *= -0.0
    words, ones = layout.binary_conv(noise(seed + 3, shape.n, shape.k), shape.taps)
    return x, words, ones, noise(seed + 4, shape.n)


def columns_of(pattern: str, n: int, k: int, seed: int) -> tuple[int, Tensor]:
    """Return how many outputs share columns and the columns [groups, length] of a pattern."""
    kept, size = (int(part) for part in pattern.split(":"))
    if kept == 1 and size > 16:  # "1:1xx": blocks of xx outputs
        rows = size - 100
        groups, length = n // rows, max(1, k // 2)
        return rows, noise(seed, groups, k).argsort(dim=1)[:, :length].sort(dim=1).values
    places = noise(seed, n, k // size, size).argsort(dim=2)[..., :kept].sort(dim=2).values
    return 1, (places + torch.arange(k // size).unsqueeze(1) * size).flatten(1)


def sparse_case(pattern: str, n: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    rows, columns = columns_of(pattern, n, k, seed)
    values = noise(seed + 1, len(columns), columns.shape[1], rows)
    return layout.sparse_groups(values, columns, k)


PATTERNS = {"2:4": (4, 1), "4:8": (8, 1), "1:16": (16, 1), "1:102": (1, 2), "1:103": (1, 3), "1:104": (1, 4),
            "1:105": (1, 5), "1:116": (1, 16)}  # name: inputs and outputs are multiples of  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=60, deadline=None)
@given(shape=shapes, biased=st.booleans(), seed=st.integers(0, 2**31))
def test_any_binary_convolution_equals_the_float_one(path: str, shape: Shape, biased: bool, seed: int) -> None:
    x, words, ones, scale = binary_case(shape, seed)
    bias = noise(seed + 5, shape.n) if biased else None
    got = backend.binary_conv2d(x, words, ones, scale, bias, None, *shape.geometry, path=path)
    assert torch.equal(got, reference.binary_conv2d(x, words, scale, bias, None, *shape.geometry))


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**31))
def test_thresholds_compare_the_same_sums(path: str, shape: Shape, seed: int) -> None:
    x, words, ones, scale = binary_case(shape, seed)
    thresholds = (noise(seed + 6, shape.n) * shape.k**0.5).to(torch.int32)
    got = backend.binary_conv2d(x, words, ones, scale, None, thresholds, *shape.geometry, path=path)
    assert torch.equal(got, reference.binary_conv2d(x, words, scale, None, thresholds, *shape.geometry))
    assert set(got.unique().tolist()) <= {-1.0, 1.0}


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(0, 300), k=st.integers(1, 1100), n=st.integers(1, 200), kind=st.sampled_from("sbt"),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_binary_linear_layer_equals_the_float_one(path: str, m: int, k: int, n: int, kind: str, seed: int) -> None:
    x, scale = noise(seed, m, k), noise(seed + 1, n)
    words = layout.binary_linear(noise(seed + 2, n, k))
    bias = noise(seed + 3, n) if kind == "b" else None
    thresholds = noise(seed + 4, n).mul(k**0.5).to(torch.int32) if kind == "t" else None
    got = backend.binary_linear(x, words, scale, bias, thresholds, path=path)
    assert torch.equal(got, reference.binary_linear(x, words, scale, bias, thresholds))


def assert_close(got: Tensor, want: Tensor, k: int) -> None:
    """Sums of k products in another order and with other roundings: some units in the last place of the terms."""
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6 * k**0.5)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=80, deadline=None)
@given(
    shape=shapes, pattern=st.sampled_from(sorted(PATTERNS)), wide=st.booleans(), biased=st.booleans(),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_sparse_convolution_equals_the_dense_one(
    path: str, shape: Shape, pattern: str, wide: bool, biased: bool, seed: int
) -> None:
    inputs, outputs = PATTERNS[pattern]
    channels = 64 if wide else -(-shape.channels // inputs) * inputs
    shape = Shape(shape.images, channels, -(-shape.n // outputs) * outputs, shape.size, *shape.geometry)
    values, columns = sparse_case(pattern, shape.n, shape.k, seed)
    x, bias = noise(seed + 2, shape.images, channels, *shape.size), noise(seed + 3, shape.n) if biased else None
    got = backend.sparse_conv2d(x, values, columns, bias, *shape.geometry, path=path)
    assert_close(got, reference.sparse_conv2d(x, values, columns, bias, *shape.geometry), shape.k)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(0, 300), k=st.integers(1, 20), n=st.integers(1, 40), pattern=st.sampled_from(sorted(PATTERNS)),
    biased=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_sparse_linear_layer_equals_the_dense_one(
    path: str, m: int, k: int, n: int, pattern: str, biased: bool, seed: int
) -> None:
    inputs, outputs = PATTERNS[pattern]
    k, n = 16 * k * inputs // min(inputs, 16), -(-n // outputs) * outputs
    values, columns = sparse_case(pattern, n, k, seed)
    x, bias = noise(seed + 2, m, k), noise(seed + 3, n) if biased else None
    got = backend.sparse_linear(x, values, columns, bias, path=path)
    assert_close(got, reference.sparse_linear(x, values, columns, bias), k)


@pytest.mark.parametrize("path", PATHS)
def test_threads_and_batches_change_no_bit(path: str, threads: int) -> None:
    shape = Shape(5, 48, 40, (23, 17), (3, 3), (1, 1), (1, 1))
    x, words, ones, scale = binary_case(shape, 3)
    binary = backend.binary_conv2d(x, words, ones, scale, None, None, *shape.geometry, path=path)
    assert torch.equal(binary, reference.binary_conv2d(x, words, scale, None, None, *shape.geometry))
    before = torch.get_num_threads()
    for pattern in ("2:4", "1:116"):
        n = 48
        values, columns = sparse_case(pattern, n, shape.k, 4)
        together = backend.sparse_conv2d(x, values, columns, None, *shape.geometry, path=path)
        torch.set_num_threads(1)
        alone = [backend.sparse_conv2d(image[None], values, columns, None, *shape.geometry, path=path) for image in x]
        torch.set_num_threads(before)
        assert torch.equal(together, torch.cat(alone))
        rows = noise(5, 300, shape.k)
        whole = backend.sparse_linear(rows, values, columns, None, path=path)
        part = backend.sparse_linear(rows[250:], values, columns, None, path=path)
        assert torch.equal(whole[250:], part)


@pytest.mark.parametrize("path", PATHS)
def test_an_image_larger_than_a_block_and_one_of_many_blocks(path: str, threads: int) -> None:
    shape = Shape(40, 64, 8, (64, 64), (1, 1))  # 40 images of 1 MB: ten blocks
    values, columns = sparse_case("2:4", 8, shape.k, 1)
    x = noise(2, 40, 64, 64, 64)
    got = backend.sparse_conv2d(x, values, columns, None, *shape.geometry, path=path)
    assert_close(got, reference.sparse_conv2d(x, values, columns, None, *shape.geometry), 64)


@pytest.mark.parametrize("path", PATHS)
def test_the_largest_sums_do_not_overflow_their_bytes(path: str) -> None:
    k = 32 * 200  # bytes hold the counts of 31 words
    x = torch.ones(3, k)
    for sign in (1.0, -1.0):
        words = layout.binary_linear(torch.full((5, k), sign))
        got = backend.binary_linear(x, words, torch.ones(5), None, None, path=path)
        assert torch.equal(got, torch.full((3, 5), sign * k))


@pytest.mark.parametrize("path", PATHS)
def test_zeros_count_as_plus_one_and_nan_as_minus_one(path: str) -> None:
    x = torch.tensor([[0.0, -0.0, float("nan"), -1e-45, float("inf"), -float("inf")]])
    words = layout.binary_linear(torch.eye(6) * 2 - 1)
    scale = torch.ones(6)
    got = backend.binary_linear(x, words, scale, None, None, path=path)
    assert torch.equal(got, F.linear(torch.tensor([[1.0, 1, -1, -1, 1, -1]]), torch.eye(6) * 2 - 1))


def test_layouts_give_back_what_they_were_made_of() -> None:
    signs = torch.where(noise(1, 70, 9 * 40) > 0, 1.0, -1.0)
    assert torch.equal(layout.binary_linear_signs(layout.binary_linear(signs), 70, 360), signs)
    words, ones = layout.binary_conv(signs, 9)
    assert torch.equal(layout.unpack_signs(words, 40).flatten(1), signs)
    assert torch.equal(ones.sum(dim=1), (signs > 0).sum(dim=1).to(torch.int32))
    rows, columns = columns_of("2:4", 12, 360, 2)
    values = noise(3, 12, 180, rows)
    dense = torch.zeros(12, 360).scatter_(1, columns, values[..., 0])
    by_window, own_columns = layout.sparse_groups(values, columns, 360)
    assert by_window.shape == (6, 12, 30, 1)  # windows of 60 inputs
    assert torch.equal(layout.sparse_matrix(by_window, own_columns, 360), dense)


def test_a_column_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="not"):
        layout.sparse_groups(torch.ones(1, 2, 1), torch.tensor([[0, 8]]), 8)
    with pytest.raises(ValueError, match="not"):
        layout.sparse_groups(torch.ones(1, 2, 1), torch.tensor([[-1, 7]]), 8)


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_operators_take_any_strides_and_other_dtypes(channels_last: bool) -> None:
    shape = Shape(2, 32, 16, (9, 9), (3, 3), (2, 2), (1, 1))
    x, words, ones, scale = binary_case(shape, 7)
    values, columns = sparse_case("2:4", 16, shape.k, 8)
    x = x.to(memory_format=torch.channels_last) if channels_last else x[:, :, ::1]
    want = reference.binary_conv2d(x, words, scale, None, None, *shape.geometry)
    assert torch.equal(ops.binary_conv2d(x, words, ones, scale, None, None, *shape.geometry), want)
    half = ops.binary_conv2d(x.bfloat16(), words, ones, scale, None, None, *shape.geometry)
    assert half.dtype == torch.bfloat16
    dense = reference.sparse_conv2d(x, values, columns, None, *shape.geometry)
    assert_close(ops.sparse_conv2d(x, values, columns, None, *shape.geometry), dense, shape.k)
    rows = noise(9, 3, 2, 2 * shape.k)[..., ::2]
    want = reference.sparse_linear(rows, values, columns, None)
    assert_close(ops.sparse_linear(rows, values, columns), want, shape.k)
    assert ops.sparse_linear(rows.double(), values, columns).dtype == torch.float64


def test_torch_compile_keeps_the_operators_whole() -> None:
    shape = Shape(2, 32, 16, (9, 9), (3, 3), (2, 2), (1, 1))
    x, words, ones, scale = binary_case(shape, 7)
    values, columns = sparse_case("2:4", 16, shape.k, 8)
    linear_words = layout.binary_linear(noise(9, 10, 16))

    def network(x: Tensor) -> Tensor:
        y = ops.binary_conv2d(x, words, ones, scale, None, None, *shape.geometry)
        y = y + ops.sparse_conv2d(x, values, columns, None, *shape.geometry)
        y = ops.binary_linear(y.mean(dim=(2, 3)), linear_words, torch.ones(10))
        return ops.sparse_linear(F.pad(y, (0, shape.k - 10)), values, columns)

    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), network(x))


def test_wrong_tensors_are_refused_in_words() -> None:
    shape = Shape(2, 32, 16, (9, 9), (3, 3))
    x, words, ones, scale = binary_case(shape, 7)
    values, columns = sparse_case("2:4", 16, shape.k, 8)
    for changed in ((x[:, :31], words[..., :0]), (x, words[:8]), (x, words.long())):
        with pytest.raises(ValueError, match="words are"):
            ops.binary_conv2d(*changed, ones, scale, None, None, *shape.geometry)
    with pytest.raises(ValueError, match="thresholds are"):
        ops.binary_conv2d(x, words, ones, scale, None, scale, *shape.geometry)
    with pytest.raises(ValueError, match="too small"):
        ops.binary_conv2d(x[..., :2], words, ones, scale, None, None, *shape.geometry)
    with pytest.raises(ValueError, match="images, channels"):
        ops.sparse_conv2d(x[0], values, columns, None, *shape.geometry)
    with pytest.raises(ValueError, match="columns are"):
        ops.sparse_linear(x.flatten(1)[:, : shape.k], values, columns.long())
    with pytest.raises(ValueError, match="biases are"):
        ops.sparse_linear(x.flatten(1)[:, : shape.k], values, columns, torch.ones(3))
