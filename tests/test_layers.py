"""What a decoder layer computes beside its products, by every native path: against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qtoolkit import layers
from qtoolkit.kernels.cpu.rounding import library as native

paths = pytest.mark.parametrize("path", list(native.load().paths) if native.failure() is None else [])
SHAPES = [(2, 8, 4, 512, 32), (1, 6, 2, 129, 96), (3, 4, 4, 1, 64), (1, 2, 1, 33, 256), (1, 1, 1, 700, 32)]


def heads(sequences: int, count: int, tokens: int, width: int) -> Tensor:
    """Heads as a projection leaves them: tokens apart, a head's numbers side by side."""
    draw = torch.Generator().manual_seed(tokens * count)
    return torch.randn(sequences, tokens, count, width, generator=draw).transpose(1, 2)


def away(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@paths
@pytest.mark.parametrize(("sequences", "count", "sources", "tokens", "width"), SHAPES)
def test_tokens_attend_to_themselves_and_those_before(
    sequences: int, count: int, sources: int, tokens: int, width: int, path: str
) -> None:
    query, key, value = (heads(sequences, some, tokens, width) for some in (count, sources, sources))
    key, value = key * 2.0, value + 0.5
    found = native.attend(query, key, value, 0.3, path)
    wanted = F.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), is_causal=True, scale=0.3, enable_gqa=True
    )
    assert found.shape == (sequences, tokens, count, width)
    assert away(found, wanted.transpose(1, 2)) < 2e-6


@paths
def test_scores_of_any_size_make_weights_and_nan_stays(path: str) -> None:
    query, key, value = (heads(1, 1, 40, 32) for _ in range(3))
    found = native.attend(query * 1e4, key, value, 1.0, path)  # one key takes all
    wanted = F.scaled_dot_product_attention(query.double() * 1e4, key.double(), value.double(), is_causal=True, scale=1)
    assert away(found, wanted.transpose(1, 2)) < 1e-3
    query[0, 0, 7, 3] = torch.nan
    found = native.attend(query, key, value, 1.0, path)
    assert found[0, 7].isnan().all()
    assert found[0, [6, 8]].isfinite().all()


@pytest.mark.skipif(native.failure() is not None, reason="no native loops here")
def test_threads_change_no_bit_of_attention() -> None:
    query, key, value = (heads(2, 4, 300, 64) for _ in range(3))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(native.attend(query, key, value, 0.125))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_other_attention_is_left_to_torch() -> None:
    good = heads(1, 4, 20, 32)
    long = torch.empty(1, 1, native.MOST_LENGTH + 1, 32)
    for query, key in (
        (heads(1, 4, 20, 40), heads(1, 4, 20, 40)),  # no whole number of vectors
        (good, heads(1, 3, 20, 32)),
        (good, heads(1, 4, 21, 32)),
        (good.double(), good.double()),
        (long, long),
        (good.transpose(2, 3), good.transpose(2, 3)),
    ):
        assert not layers.attends(query, key, key)
        with pytest.raises(ValueError, match="no attention"):
            native.attend(query, key, key, 1.0)


@paths
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 256), (7, 100), (2, 300, 131)])
def test_a_norm_and_a_gate_are_those_of_float64(shape: tuple[int, ...], path: str) -> None:
    draw = torch.Generator().manual_seed(len(shape))
    x, up = (torch.randn(shape, generator=draw) * 20 for _ in range(2))
    weight = torch.randn(shape[-1], generator=draw)
    wide = x.double()
    wanted = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + 1e-5) * weight.double()
    assert away(native.normed(x, weight, 1e-5, path), wanted) < 1e-6
    assert away(native.gated(x, up, path), F.silu(wide) * up.double()) < 1e-6


@paths
def test_gates_at_their_ends(path: str) -> None:
    gate = torch.tensor([torch.nan, 1e30, -1e30, torch.inf, -1.0, 0.0])
    found = native.gated(gate, torch.ones(6), path)
    assert found[0].isnan()
    torch.testing.assert_close(found[1:], torch.tensor([1e30, 0.0, torch.inf, -0.26894143, 0.0]), rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(native.failure() is not None, reason="no native loops here")
def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="no norm"):
        native.normed(torch.ones(2, 4), torch.ones(3), 1e-5)
    with pytest.raises(ValueError, match="no gate"):
        native.gated(torch.ones(2, 4), torch.ones(4))
    with pytest.raises(ValueError, match="float32"):
        native.gated(torch.ones(4).double(), torch.ones(4).double())
