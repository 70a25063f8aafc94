"""Products by oneDNN: taken only where they are float32's and faster, and given back as they were."""

from __future__ import annotations

import pytest
import torch

from qtoolkit.calibration import products

CPU = torch.device("cpu")


def test_products_inside_have_the_precision_of_float32() -> None:
    with products.fast(CPU, products.WIDE):
        assert products.exact()


def test_what_was_set_before_is_set_again() -> None:
    with pytest.raises(KeyError), products.fast(CPU, products.WIDE):
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"


def test_products_that_are_not_exact_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "exact", lambda: False)
    with products.fast(CPU, products.WIDE):
        assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(("name", "precision"), [("Intel Xeon", "highest"), ("AMD EPYC", "medium"), ("", "medium")])
def test_intels_cpus_keep_mkl(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "exact", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name})
    with products.fast(CPU, products.WIDE):
        assert torch.get_float32_matmul_precision() == precision


def test_sums_over_tokens_may_round_where_other_products_must_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with products.rough():
        assert torch.get_float32_matmul_precision() == "highest"  # nobody has asked for speed
    monkeypatch.setattr(products.sums, "native_on", lambda device: "")
    monkeypatch.setattr(products, "exact", lambda: False)
    with products.fast(CPU, products.WIDE):
        with products.rough():
            assert torch.get_float32_matmul_precision() == "medium"
        assert torch.get_float32_matmul_precision() == "highest"
    with products.rough():
        assert torch.get_float32_matmul_precision() == "highest"


def test_a_matrix_is_halved_only_where_products_may_be_rough(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, right = torch.randn(70, 30), torch.randn(30, 20)
    assert products.halved(matrix) is matrix
    assert torch.equal(products.times(matrix, right), matrix @ right)
    monkeypatch.setattr(products.sums, "native_on", lambda device: "")
    monkeypatch.setattr(products, "exact", lambda: False)
    with products.fast(CPU, products.WIDE):
        assert products.halved(matrix) is matrix
        with products.rough():
            halved, turned = products.halved(matrix), products.halved(matrix, columns=True)
    assert halved.dtype == turned.dtype == torch.bfloat16
    assert torch.equal(halved, turned)
    assert turned.T.is_contiguous()
    exact = matrix @ right
    found = products.times(halved, right)
    assert found.dtype == torch.float32
    assert 0 < (found - exact).norm() < 1e-2 * exact.norm()
    total = torch.ones(70, 20)
    assert products.add(total, halved, right, alpha=-2.0) is total
    assert (total - 1 + 2 * exact).norm() < 1e-2 * exact.norm()


def test_a_sum_over_tokens_stays_near_the_exact_one_and_positive() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 256, generator=draw) @ torch.rand(256, 256, generator=draw)
    wanted = x.double().T @ x.double()
    with products.fast(CPU, products.WIDE), products.rough():
        found = (x.T @ x).double()
    assert (found - wanted).norm() < 1e-4 * wanted.norm()
    assert torch.linalg.eigvalsh(found).min() > 0


def test_what_a_user_has_set_stays() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with products.fast(CPU, products.WIDE):
            assert torch.get_float32_matmul_precision() == "high"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_bfloat16_products_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.Tensor.__matmul__

    def rounded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return whole(a.bfloat16(), b.bfloat16()).float() if a.dtype == torch.float32 else whole(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not products.exact()


def test_narrow_models_keep_their_products() -> None:
    with products.fast(CPU, products.WIDE - 1):
        assert torch.get_float32_matmul_precision() == "highest"
