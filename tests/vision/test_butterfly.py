"""Butterfly factors: the algebra, the published chains, the search, and the least-squares fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qtoolkit.calibration import als, chains
from qtoolkit.calibration.debut import balanced
from qtoolkit.vision import butterfly, models
from qtoolkit.vision.matrix import to_matrix


@pytest.mark.parametrize(
    ("n", "k", "text", "percent"),  # LC of DeBut, tables A1 and A2
    [
        (16, 72, "2x3x1 1x3x2 2x2x2 4x4x4", 75.00),
        (16, 72, "4x3x1 1x2x4 2x6x4 2x2x8", 55.56),
        (16, 72, "4x3x1 2x2x4 1x2x8 2x6x8", 41.67),
        (128, 400, "8x25x1 2x2x8 2x2x16 2x2x32 2x2x64", 91.75),
        (128, 400, "8x5x1 4x5x8 2x4x32 2x4x64", 85.75),
        (512, 4608, chains.PUBLISHED[512, 4608], 96.79),
    ],
)
def test_published_chains_save_what_the_paper_says(n: int, k: int, text: str, percent: float) -> None:
    chain = butterfly.parse(text, k)
    assert chain[-1].p == n
    assert round(100 * butterfly.layer_compression(chain), 2) == percent
    assert butterfly.parse(butterfly.text(chain), k) == chain


def test_applying_the_factors_is_multiplying_with_their_dense_product() -> None:
    chain = butterfly.parse("2x3x1 1x3x2 2x2x2 4x4x4", 72)
    values = [torch.randn(f.shape, dtype=torch.float64) for f in chain]
    x = torch.randn(5, 72, dtype=torch.float64)
    product = butterfly.dense(chain, values)
    assert (product != 0).all()  # the density rule
    torch.testing.assert_close(butterfly.apply(x, chain, values), x @ product.T)


@pytest.mark.parametrize("text", ["2x3x2 2x2x4", "2x5x1 8x4x2", "2x3x1", "2x3", ""])
def test_what_is_no_chain_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"t is|divide|block|form|empty"):
        butterfly.parse(text, 72)


@pytest.mark.parametrize(
    ("n", "k", "saved"), [(16, 72, 0.5), (128, 400, 0.9), (32, 144, 0.8), (64, 576, 0.9), (10, 64, 0.2), (96, 48, 0.5)]
)
def test_a_searched_chain_is_valid_dense_and_within_the_budget(n: int, k: int, saved: float) -> None:
    chain = chains.search(n, k, saved)
    assert chain is not None
    assert (chain[0].q, chain[-1].p) == (k, n)
    assert butterfly.layer_compression(chain) >= saved - 1e-9
    assert (butterfly.dense(chain, [torch.ones(f.shape) for f in chain]) > 0).all()


def test_where_nothing_saves_enough_the_search_says_so() -> None:
    assert chains.search(7, 11, 0.9) is None


@pytest.mark.parametrize(
    ("layer", "text", "bound"),  # 1.01 times the reference's own error after five sweeps; the paper's are larger
    [
        ("conv2", "2x3x1 1x3x2 2x2x2 4x4x4", 0.753),
        ("conv2", "4x3x1 2x2x4 1x2x8 2x6x8", 0.535),
        ("fc", "8x25x1 2x2x8 2x2x16 2x2x32 2x2x64", 0.900),
    ],
)
def test_five_sweeps_fit_as_well_as_published(shared_data: Path, layer: str, text: str, bound: float) -> None:
    network = models.resolve("lenet", shared_data / "vision/weights/lenet_mnist.npz").network
    matrix = to_matrix(network.get_submodule(layer).weight.detach())  # type: ignore[arg-type]
    chain = butterfly.parse(text, matrix.shape[1])
    flat = als.fit(matrix, chain, 5, torch.Generator().manual_seed(0))
    assert als.relative_error(matrix, chain, flat) < bound
    once = als.fit(matrix, chain, 1, torch.Generator().manual_seed(0))
    assert als.relative_error(matrix, chain, flat) <= als.relative_error(matrix, chain, once)


def test_a_matrix_that_is_a_product_is_found() -> None:
    chain = butterfly.parse("4x4x1 4x4x4", 16)
    values = [torch.randn(f.shape, generator=torch.Generator().manual_seed(1)) for f in chain]
    matrix = butterfly.dense(chain, values)
    flat = als.fit(matrix, chain, 20, torch.Generator().manual_seed(0))
    assert als.relative_error(matrix, chain, flat) < 1e-4
    torch.testing.assert_close(
        butterfly.dense(chain, butterfly.split(balanced(flat, chain), chain)), matrix, rtol=1e-3, atol=1e-3
    )
