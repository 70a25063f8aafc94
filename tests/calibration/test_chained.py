"""The chained grid: what it may hold, that rounding onto it costs no more than onto int4, and Hessian compensation."""

import pytest
import torch

from qtoolkit.calibration import chained, grid
from qtoolkit.kernels import chained as kernel_grid
from qtoolkit.scheme import CHANNEL, Scheme

CHANNELS = Scheme(group_size=CHANNEL)


def weights(kind: str, n: int = 64, k: int = 1024) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    if kind == "normal":
        return torch.randn(n, k, generator=random)
    signs = torch.rand(n, k, generator=random) - 0.5
    return -signs.sign() * (1 - 2 * signs.abs()).log()  # Laplace


def test_rounded_weights_lie_on_the_grid_that_the_kernels_read() -> None:
    weight = weights("normal")
    found = chained.integers(weight, torch.full((64, 1), 0.3))
    codes = kernel_grid.codes_of(found)
    assert codes is not None
    assert torch.equal(kernel_grid.values(codes), found)


def test_ordinary_int8_weights_are_not_taken_for_chained_ones() -> None:
    found = chained.integers(weights("normal"), torch.full((64, 1), 0.3))
    changed = found.clone()
    changed[3, 8] += 1  # the first of a word has no lower bits
    assert kernel_grid.codes_of(changed) is None
    changed = found.clone()
    changed[5, 13] ^= 2
    assert kernel_grid.codes_of(changed) is None
    assert kernel_grid.codes_of(found[:, :12]) is None
    assert kernel_grid.codes_of(found.float()) is None


@pytest.mark.parametrize("kind", ["normal", "laplace"])
def test_rounding_costs_no_more_than_plain_int4(kind: str) -> None:
    """Each grid with its own searched scale; between 0.98 and 1.02 of the squared error on smooth distributions."""
    weight = weights(kind)
    every = torch.ones(weight.shape[1])
    plain = grid.searched_scales(weight, every, CHANNELS, torch.float32)
    own = grid.searched_scales(weight, every, CHANNELS, torch.float32, chained.rounded)
    lost = (chained.rounded(weight, own) - weight).square().sum()
    lost_plain = (grid.to_codes(weight, plain, CHANNELS) * plain - weight).square().sum()
    assert 0.95 < float(lost / lost_plain) < 1.02


def test_words_keep_together_where_their_first_input_stood() -> None:
    order = torch.tensor([9, 0, 15, 20, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 16, 17, 18, 19, 21, 22, 23])
    assert chained.in_words(order).tolist() == [*range(8, 16), *range(8), *range(16, 24)]


def test_compensation_on_the_grid_beats_rounding_to_it() -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 64, generator=random)
    mixed = torch.randn(64, 64, generator=random) @ torch.randn(64, 64, generator=random) / 8
    x = torch.randn(512, 64, generator=random) @ mixed
    hessian = x.T @ x / len(x)
    order = chained.in_words(hessian.diagonal().argsort(descending=True))
    damped = hessian[order][:, order] + 0.01 * hessian.diagonal().mean() * torch.eye(64)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    step = grid.searched_scales(weight, hessian.diagonal(), CHANNELS, torch.float32, chained.rounded)

    def error(served: torch.Tensor) -> float:
        return float((x @ (served - weight).T).square().sum())

    found = chained.round_in_order(weight, factor, step, order)
    assert kernel_grid.codes_of(found) is not None
    assert error(found * step / chained.STEP) < 0.7 * error(chained.rounded(weight, step))
