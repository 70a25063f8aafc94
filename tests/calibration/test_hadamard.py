"""Generated Hadamard matrices: signs only, orthogonal rows, for every size that models have."""

from __future__ import annotations

import pytest
import torch

from qtoolkit.calibration import hadamard

PALEY = (12, 20, 28, 36, 52, 60, 76, 84, 108, 140, 180, 312, 344)  # 28, 36 second kind; 28 = 27 + 1, 52: prime powers
DOUBLED = (1, 2, 4, 8, 64, 256, 24, 40, 80, 576, 896)


@pytest.mark.parametrize("n", PALEY + DOUBLED)
def test_a_hadamard_matrix_has_signs_and_orthogonal_rows(n: int) -> None:
    matrix = hadamard.matrix(n)
    assert matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))  # integers: exact


@pytest.mark.parametrize("n", [64, 128, 20, 28, 52, 104, 576])
def test_the_product_by_factors_is_the_product_with_the_matrix_and_is_undone_by_its_transpose(n: int) -> None:
    x = torch.randn(2, 3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    turned = hadamard.times(x)
    torch.testing.assert_close(turned, x @ hadamard.matrix(n) / n**0.5, rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard.times(turned, transposed=True), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [1536, 2048, 2304, 2560, 2880, 3072, 3584, 4096, 5120, 5376, 6656, 7168, 8192, 11008])
def test_the_hidden_sizes_of_large_models_fit(n: int) -> None:
    assert hadamard.fits(n)


@pytest.mark.parametrize("n", [0, 3, 6, 48 + 2, 92, 156, 172])
def test_sizes_without_a_construction_are_said_not_to_fit(n: int) -> None:
    assert not hadamard.fits(n)
    with pytest.raises(ValueError, match=str(n)):
        hadamard.factors(n)
