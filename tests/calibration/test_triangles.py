"""Blocked Cholesky factors against float64, in one memory with the matrix."""

from __future__ import annotations

import pytest
import torch

from qtoolkit import sums
from qtoolkit.calibration import products, triangles

CPU = torch.device("cpu")
whole = pytest.mark.skipif(sums.native_on(CPU) != sums.VNNI, reason="products of whole numbers do not run here")
SIZES = (1, 7, triangles.BLOCK, triangles.BLOCK + 1, 2 * triangles.BLOCK + 77)


def symmetric(k: int) -> torch.Tensor:
    torch.manual_seed(k)
    rows = torch.randn(k + 50, k)
    made = rows.T @ rows / k
    made.diagonal().add_(0.01)
    return made.triu() + made.triu(1).T


@pytest.mark.parametrize("k", SIZES)
def test_a_factor_and_what_it_solves_are_those_of_float64(k: int) -> None:
    matrix = symmetric(k)
    both = matrix.clone()
    assert triangles.factor(both)
    exact = torch.linalg.cholesky(matrix.double())
    assert (both.tril() - exact).norm() < 1e-5 * exact.norm()
    assert both.triu(1).equal(matrix.triu(1))
    right = torch.randn(5, k)
    found = triangles.solved(both, right.clone())
    assert (found.double() @ matrix.double() - right).norm() < 1e-4 * right.norm()
    again = triangles.mirrored(both)
    again.diagonal().copy_(matrix.diagonal())
    assert again.equal(matrix)


@pytest.mark.parametrize("k", SIZES)
def test_the_inverse_factor_gives_the_inverse(k: int) -> None:
    matrix = symmetric(k)
    upper = triangles.inverse_factor(matrix.flip(0, 1).contiguous())
    assert upper is not None
    assert upper.equal(upper.triu())
    product = upper.double().T @ upper.double() @ matrix.double()
    assert (product - torch.eye(k)).norm() < 1e-3 * k**0.5


@pytest.mark.parametrize("place", [0, triangles.BLOCK + 3])
def test_a_singular_matrix_has_no_factor_and_can_be_had_back(place: int) -> None:
    matrix = symmetric(triangles.BLOCK + 40)
    matrix[place] = matrix[:, place] = 0.0
    both = matrix.clone()
    assert not triangles.factor(both)
    again = triangles.mirrored(both)
    again.diagonal().copy_(matrix.diagonal())
    assert again.equal(matrix)
    assert triangles.inverse_factor(matrix.flip(0, 1).contiguous()) is None
    matrix[place, place] = torch.nan
    assert not triangles.factor(matrix)


@whole
@pytest.mark.parametrize("k", [300, 1100])
def test_a_rough_factor_is_that_of_a_matrix_nearby(k: int) -> None:
    size = torch.logspace(-2, 2, k)[torch.randperm(k, generator=torch.Generator().manual_seed(0))]
    matrix = symmetric(k)
    matrix.diagonal().mul_(1.33)  # as a quarter of shrinkage leaves it
    matrix *= size * size[:, None]
    both = matrix.clone()
    with products.fast(CPU, 64):
        assert triangles.factor(both, rough=True)
        upper = triangles.inverse_factor(matrix.flip(0, 1).contiguous(), rough=True)
    assert both.triu(1).equal(matrix.triu(1))
    root = matrix.diagonal().double().sqrt()
    away = (both.tril().double() @ both.tril().double().T - matrix) / root / root[:, None]
    assert away.abs().max() < 1e-3
    assert (away.abs().max() > 1e-5) == (k > triangles.BLOCK)  # within a block nothing is rounded
    assert upper is not None
    assert upper.equal(upper.triu())
    identity = upper.double() @ matrix.double() @ upper.double().T
    assert (identity - torch.eye(k)).abs().max() < 0.02


@whole
def test_a_matrix_that_has_a_rough_factor_no_more_gets_an_exact_one() -> None:
    k = 1100
    matrix = 1e-2 * symmetric(k) + 1.0  # of rank one but for a little
    wanted, rough = matrix.clone(), matrix.clone()
    assert triangles.factor(wanted)
    with products.fast(CPU, 64):
        with products.in_whole_numbers(True) as may:
            assert may
            assert not triangles._factor(rough)
        again = matrix.clone()
        assert triangles.factor(again, rough=True)
        assert again.equal(wanted)
        with products.rough():  # it is for whoever asks for the factor to say
            again = matrix.clone()
            assert triangles.factor(again)
            assert again.equal(wanted)


def test_a_matrix_is_normalized_and_had_back_with_its_bits() -> None:
    k = triangles.BLOCK + 40
    size = torch.logspace(-6, 6, k)
    matrix = symmetric(k) * size * size[:, None]
    both, right = matrix.clone(), torch.randn(5, k) * size
    root = triangles.normalized(both)
    assert (both.diagonal() > 0.49).all()
    assert (both.diagonal() < 2.01).all()
    again = both.clone()
    triangles.scaled(again, 1 / root)
    assert again.equal(matrix)
    assert triangles.factor(both)
    found = triangles.Factor(both, root).solved(right.clone()).double() @ matrix.double()
    assert ((found - right) / size).norm() < 1e-3 * (right / size).norm()


def test_an_infinite_matrix_has_no_factor_and_stays() -> None:
    matrix = symmetric(40)
    matrix[3, 3] = torch.inf
    both = matrix.clone()
    root = triangles.normalized(both)
    assert not triangles.factor(both.clone())
    triangles.scaled(both, 1 / root)
    assert both.equal(matrix)
