"""The kernel benchmark compares in turns, states the machine's limits, and keeps the names its readers know."""

from __future__ import annotations

import pytest
import torch

from qtoolkit.evals import kernel_bench, kernel_peers
from qtoolkit.kernels import reference
from qtoolkit.kernels.cpu import library

NAMES = ("qtoolkit-g128", "qtoolkit-channel", "torch-bf16")


def test_rows_and_limits_have_the_documented_names() -> None:
    result = kernel_bench.run(((256, 128),), (1, 3), NAMES, seconds=0.01)
    assert [(row["k"], row["n"], row["m"], row["name"]) for row in result["rows"]] == [
        (256, 128, m, name) for m in (1, 3) for name in NAMES
    ]
    for row in result["rows"]:
        assert row["runs"] >= 5
        assert 0 < row["min_us"] <= row["median_us"] <= row["max_us"]
    assert set(result["limits"]) == {"bandwidth_gbs", "int8_gops"}
    if library.failure() is None:
        assert result["limits"]["bandwidth_gbs"] > 0
    text = kernel_bench.table(result)
    assert all(name in text for name in NAMES)
    assert text.count("\n") >= 6


def test_an_unknown_contestant_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no such peer here: nobody; known: .*torch-bf16"):
        kernel_peers.peers(("nobody",))


@pytest.mark.parametrize("peer", kernel_peers.peers(), ids=lambda peer: peer.name)
def test_every_contestant_multiplies(peer: kernel_peers.Peer) -> None:
    torch.manual_seed(0)
    layer = peer.make(256, 128)
    x = torch.randn(5, 256).bfloat16()
    y = layer(x)
    assert y.shape == (5, 128)
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()
    # activations of twice the size give outputs of twice the size: the layer is linear, int8 activations included
    assert torch.allclose(layer(2 * x).float(), 2 * y.float(), rtol=0.02, atol=0.02 * float(y.float().abs().max()))


def test_ours_is_the_product_that_is_served() -> None:
    x = torch.randn(3, 256).bfloat16()
    torch.manual_seed(1)
    got = kernel_peers.ours(128)(256, 128)(x)
    torch.manual_seed(1)
    scales = (torch.rand(128, 2) * 0.01).bfloat16()
    codes = reference.unpack_int4(kernel_peers.random_int4(256, 128), 256)
    assert torch.equal(got, reference.w4a8_linear(x, codes, scales, None, 128))
