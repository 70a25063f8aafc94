"""Blocked Cholesky factors against float64, in one memory with the matrix."""

from __future__ import annotations

import pytest
import torch

from qtoolkit.calibration import triangles

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
