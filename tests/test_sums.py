"""Sums of products of rounded factors: against float64 products of these, and torch's where no units multiply them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtoolkit import sums
from qtoolkit.calibration import products
from qtoolkit.calibration.hessian import Hessian
from qtoolkit.kernels.cpu.rounding import library as native

CPU = torch.device("cpu")
SHAPES = [(1, 1, 1), (16, 32, 32), (37, 50, 70), (64, 33, 1025), (130, 200, 2500), (5, 300, 31)]  # m, n, steps
SPAN, LARGEST = 512, 2047  # steps that share a scale, and what the largest of them becomes
some = pytest.mark.skipif(not native.sums(), reason="no AMX and no AVX512-VNNI, or the library is not there")
paths = pytest.mark.parametrize("path", list(native.sums()))


def factors(m: int, n: int, steps: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(m * n + steps)
    return torch.randn(m, steps, generator=draw), torch.randn(steps, n, generator=draw)


def rounded(lines: Tensor, path: str) -> Tensor:
    """Return float32 lines [lines, steps] as the units of ``path`` multiply them, in float64."""
    if path == "amx":
        return lines.bfloat16().double()
    found = torch.empty(lines.shape, dtype=torch.float64)
    for first in range(0, lines.shape[1], SPAN):
        part = lines[:, first : first + SPAN]
        most = part.abs().amax(dim=1, keepdim=True)
        times = torch.where(most > 0, torch.full_like(most, LARGEST) / most, 0.0)  # a number over it: its reciprocal
        found[:, first : first + SPAN] = (part * times).round().double() * (most.double() / LARGEST)
    return found


def product(left: Tensor, right: Tensor, path: str) -> Tensor:
    return rounded(left, path) @ rounded(right.T, path).T


def away(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@paths
@pytest.mark.parametrize(("m", "n", "steps"), SHAPES)
@pytest.mark.parametrize("left_turned", [False, True])
@pytest.mark.parametrize("right_turned", [False, True])
def test_factors_are_rounded_and_sums_are_not(
    m: int, n: int, steps: int, left_turned: bool, right_turned: bool, path: str
) -> None:
    left, right = factors(m, n, steps)
    exact = product(left, right, path)
    left = left.T.contiguous().T if left_turned else left
    right = right.T.contiguous().T if right_turned else right
    wide = torch.randn(m, n + 9)
    total, beside = wide[:, 3 : n + 3], wide[:, n + 3 :].clone()  # rows lie apart
    wanted = 0.5 * total.double() + 2.0 * exact
    assert native.add_product(total, left, right, keep=0.5, share=2.0, path=path) is total
    assert away(total, wanted) < 1e-6
    assert torch.equal(wide[:, n + 3 :], beside)
    fresh = native.add_product(torch.full((m, n), torch.nan), left, right, keep=0.0, path=path)
    assert away(fresh, exact) < 1e-6


@paths
def test_a_factor_may_be_a_part_of_a_matrix(path: str) -> None:
    left, right = factors(90, 70, 200)
    wanted = product(left[20:60, 10:110], right[10:110, 5:55], path)
    found = native.add_product(torch.zeros(40, 50), left[20:60, 10:110], right[10:110, 5:55], path=path)
    assert away(found, wanted) < 1e-6


@some
def test_one_whose_numbers_lie_apart_is_copied() -> None:
    left, right = factors(300, 400, 500)
    wanted = product(left, right[:, ::2], next(iter(native.sums())))
    assert away(sums.accumulated(torch.zeros(300, 200), left, right[:, ::2], 1.0, 1.0), wanted) < 1e-6


@paths
@pytest.mark.parametrize("k", [20, 64, 200])
def test_what_a_matrix_is_with_itself_may_do_without_a_half(k: int, path: str) -> None:
    x = factors(k, 1, 300)[0].T
    whole = native.add_product(torch.zeros(k, k), x.T, x, share=0.3, path=path)
    assert away(whole, 0.3 * product(x.T, x, path)) < 1e-6
    assert torch.equal(whole, whole.T)
    for other in (x, x.clone()):
        found = native.add_product(torch.zeros(k, k), x.T, other, share=0.3, half="upper", path=path)
        assert torch.equal(found.triu(), whole.triu())
        held = torch.randn(k, k)
        found = native.add_product(held.clone(), x.T, other, keep=0.0, share=0.3, half="lower", path=path)
        assert torch.equal(found.tril(), whole.tril())
        assert torch.equal(found.triu(1), held.triu(1))


def test_the_lower_half_alone_is_torchs_business_too() -> None:
    x, held = factors(20, 1, 30)[0], torch.randn(20, 20)  # too small for the loops
    found = sums.accumulated(held.clone(), x, x.T, 0.5, -1.0, half="lower")
    assert torch.equal(found.triu(1), held.triu(1))
    assert away(found.tril(), (0.5 * held.double() - x.double() @ x.double().T).tril()) < 1e-5


@pytest.mark.skipif("avx512" not in native.sums(), reason="no AVX512-VNNI, or the library is not there")
def test_the_largest_sums_do_not_wrap_and_zeros_and_nan_stay() -> None:
    ones = torch.full((3, 2 * SPAN), 7.0)
    ones[1] = -7.0
    found = native.add_product(torch.zeros(3, 3), ones, ones.T, path="avx512")
    assert away(found, ones.double() @ ones.double().T) < 1e-6
    some, small = torch.randn(4, 600), 2.0**-120
    some[1], some[2, 5], some[3] = 0.0, torch.nan, some[3] * small
    found = native.add_product(torch.zeros(4, 2), some, torch.ones(600, 2), path="avx512")
    assert torch.equal(found[1], torch.zeros(2))
    assert found[2].isnan().all()
    assert torch.equal(found[3], torch.zeros(2))  # a span below 1e-30 counts as zeros
    assert ((found[0] - some[0].sum()).abs() < 1e-3 * some[0].abs().sum()).all()


@some
def test_a_large_total_is_the_sum_of_its_parts() -> None:
    left, right = factors(1100, 1300, 40)
    whole = native.add_product(torch.zeros(1100, 1300), left, right)
    for row in (0, 640, 1090):
        part = native.add_product(torch.zeros(10, 1300), left[row : row + 10], right)
        assert torch.equal(whole[row : row + 10], part)


@some
def test_threads_change_no_bit() -> None:
    left, right = factors(200, 333, 3000)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(native.add_product(torch.zeros(200, 333), left, right))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@some
def test_nothing_to_add_keeps_a_part() -> None:
    none = torch.empty(4, 0), torch.empty(0, 3)
    assert torch.equal(native.add_product(torch.ones(4, 3), *none, keep=0.5), torch.full((4, 3), 0.5))
    assert torch.equal(native.add_product(torch.full((4, 3), torch.nan), *none, keep=0.0), torch.zeros(4, 3))
    assert native.add_product(torch.empty(0, 3), torch.empty(0, 5), torch.ones(5, 3)).shape == (0, 3)


@some
def test_a_default_dtype_and_strides_of_one_number_are_no_matter() -> None:
    left, right = factors(200, 300, 500)
    torch.set_default_dtype(torch.float16)
    try:
        found = native.add_product(torch.zeros(200, 300, dtype=torch.float32), left, right)
    finally:
        torch.set_default_dtype(torch.float32)
    assert away(found, product(left, right, next(iter(native.sums())))) < 1e-6
    odd = torch.full((1,), 3.0).as_strided((1, 1), (7, 3))
    assert sums.accumulated(torch.ones(1, 1), odd, odd, 1.0, 1.0).item() == 10.0


@some
def test_what_is_no_product_is_refused() -> None:
    left, right = factors(4, 6, 8)
    for total, first, second in (
        (torch.zeros(4, 5), left, right),
        (torch.zeros(4, 6), left[:, :7], right),
        (torch.zeros(6, 4).T, left, right),
        (torch.zeros(4, 6), torch.randn(4, 16)[:, ::2], right),  # dense along neither dimension
        (torch.zeros(4, 6, dtype=torch.float64), left.double(), right.double()),
    ):
        with pytest.raises(ValueError, match=r"no product|float32"):
            native.add_product(total, first, second)


def test_without_units_it_is_refused_and_torch_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = factors(30, 40, 50)
    monkeypatch.setattr(native, "sums", dict)
    with pytest.raises(ValueError, match="AMX or AVX512-VNNI"):
        native.add_product(torch.zeros(30, 40), left, right)
    total = sums.accumulated(torch.ones(30, 40), left, right, 0.5, 2.0)
    assert away(total, 0.5 + 2.0 * left.double() @ right.double()) < 1e-6


@pytest.mark.parametrize(("asked", "allowed"), [("avx2", set()), ("avx512", {"avx512"}), ("", {"amx", "avx512"})])
def test_a_code_path_leaves_others_alone(asked: str, allowed: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTOOLKIT_CPU_PATH", asked)
    native.sums.cache_clear()
    try:
        assert set(native.sums()) <= allowed
    finally:
        monkeypatch.undo()
        native.sums.cache_clear()


def test_only_who_asks_for_speed_gets_rounded_factors() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 192, generator=draw) @ torch.rand(192, 192, generator=draw)
    exact = x.double().T @ x.double()
    assert away(products.accumulated(torch.zeros(192, 192), x.T, x), exact) < 1e-6
    with products.fast(CPU, 192):
        assert products.skips_lower() == bool(native.sums())
        found = products.accumulated(torch.zeros(192, 192), x.T, x)
        hessian = Hessian(192)
        for part in x.split(512):
            hessian.update(part)
    assert (away(found, exact) > 1e-6) == bool(native.sums())
    assert away(found, exact) < 1e-4
    assert away(hessian.matrix, exact * 2 / 2048) < 1e-4
    assert torch.equal(hessian.matrix, hessian.matrix.T)
    values = torch.linalg.eigvalsh(hessian.matrix.double())
    assert values.min() > -1e-6 * values.max()  # a Gram matrix still, but for the last bits of its sums


def test_what_a_user_has_set_for_products_holds_for_sums() -> None:
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    torch.set_float32_matmul_precision("high")
    try:
        with products.fast(CPU, 64):
            assert not products.skips_lower()
    finally:
        torch.set_float32_matmul_precision("highest")
    with products.fast(torch.device("meta"), 64):
        assert not products.skips_lower()
    assert away(products.accumulated(torch.zeros(64, 64), x.T, x), x.double().T @ x.double()) < 1e-6
