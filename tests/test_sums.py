"""Sums of products by AMX: against float64 products of the rounded factors, and torch's where there is no AMX."""

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
amx = pytest.mark.skipif(not native.sums(), reason="this CPU has no AMX, or the library is not there")


def factors(m: int, n: int, steps: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(m * n + steps)
    return torch.randn(m, steps, generator=draw), torch.randn(steps, n, generator=draw)


def away(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@amx
@pytest.mark.parametrize(("m", "n", "steps"), SHAPES)
@pytest.mark.parametrize("left_turned", [False, True])
@pytest.mark.parametrize("right_turned", [False, True])
def test_factors_are_rounded_and_sums_are_not(
    m: int, n: int, steps: int, left_turned: bool, right_turned: bool
) -> None:
    left, right = factors(m, n, steps)
    product = left.bfloat16().double() @ right.bfloat16().double()
    left = left.T.contiguous().T if left_turned else left
    right = right.T.contiguous().T if right_turned else right
    wide = torch.randn(m, n + 9)
    total, beside = wide[:, 3 : n + 3], wide[:, n + 3 :].clone()  # rows lie apart
    wanted = 0.5 * total.double() + 2.0 * product
    assert native.add_product(total, left, right, keep=0.5, share=2.0) is total
    assert away(total, wanted) < 1e-6
    assert torch.equal(wide[:, n + 3 :], beside)
    fresh = native.add_product(torch.full((m, n), torch.nan), left, right, keep=0.0)
    assert away(fresh, product) < 1e-6


@amx
def test_a_factor_may_be_a_part_of_a_matrix() -> None:
    left, right = factors(90, 70, 200)
    wanted = left[20:60, 10:110].bfloat16().double() @ right[10:110, 5:55].bfloat16().double()
    assert away(native.add_product(torch.zeros(40, 50), left[20:60, 10:110], right[10:110, 5:55]), wanted) < 1e-6
    assert away(sums.accumulated(torch.zeros(40, 25), left[20:60, 10:110], right[10:110, 5:55:2], 1.0, 1.0),
                wanted[:, ::2]) < 1e-6  # fmt: skip


@amx
@pytest.mark.parametrize("k", [20, 64, 200])
def test_what_a_matrix_is_with_itself_may_do_without_the_lower_half(k: int) -> None:
    x = factors(k, 1, 300)[0].T
    wanted = x.bfloat16().double().T @ x.bfloat16().double()
    whole = native.add_product(torch.zeros(k, k), x.T, x)
    assert away(whole, wanted) < 1e-6
    assert torch.equal(whole, whole.T)
    assert torch.equal(native.add_product(torch.zeros(k, k), x.T, x, upper=True).triu(), whole.triu())
    assert torch.equal(native.add_product(torch.zeros(k, k), x.T, x.clone(), upper=True).triu(), whole.triu())


@amx
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


@amx
def test_nothing_to_add_keeps_a_part() -> None:
    none = torch.empty(4, 0), torch.empty(0, 3)
    assert torch.equal(native.add_product(torch.ones(4, 3), *none, keep=0.5), torch.full((4, 3), 0.5))
    assert torch.equal(native.add_product(torch.full((4, 3), torch.nan), *none, keep=0.0), torch.zeros(4, 3))
    assert native.add_product(torch.empty(0, 3), torch.empty(0, 5), torch.ones(5, 3)).shape == (0, 3)


@amx
def test_a_default_dtype_and_strides_of_one_number_are_no_matter() -> None:
    left, right = factors(200, 300, 500)
    torch.set_default_dtype(torch.float16)
    try:
        found = native.add_product(torch.zeros(200, 300, dtype=torch.float32), left, right)
    finally:
        torch.set_default_dtype(torch.float32)
    assert away(found, left.bfloat16().double() @ right.bfloat16().double()) < 1e-6
    odd = torch.full((1,), 3.0).as_strided((1, 1), (7, 3))
    assert sums.accumulated(torch.ones(1, 1), odd, odd, 1.0, 1.0).item() == 10.0


@amx
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


def test_without_amx_it_is_refused_and_torch_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = factors(30, 40, 50)
    monkeypatch.setattr(native, "sums", lambda: False)
    with pytest.raises(ValueError, match="AMX"):
        native.add_product(torch.zeros(30, 40), left, right)
    total = sums.accumulated(torch.ones(30, 40), left, right, 0.5, 2.0)
    assert away(total, 0.5 + 2.0 * left.double() @ right.double()) < 1e-6


def test_another_code_path_leaves_amx_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTOOLKIT_CPU_PATH", "avx2")
    native.sums.cache_clear()
    try:
        assert not native.sums()
    finally:
        monkeypatch.undo()
        native.sums.cache_clear()


def test_only_who_asks_for_speed_gets_rounded_factors() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 96, generator=draw) @ torch.rand(96, 96, generator=draw)
    exact = x.double().T @ x.double()
    assert away(products.accumulated(torch.zeros(96, 96), x.T, x), exact) < 1e-6
    with products.fast(CPU, 96):
        assert products.skips_lower() == native.sums()
        found = products.accumulated(torch.zeros(96, 96), x.T, x)
        hessian = Hessian(96)
        for part in x.split(512):
            hessian.update(part)
    assert (away(found, exact) > 1e-6) == native.sums()
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
