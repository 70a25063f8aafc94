"""Int8 weights of the chained grid: run from four bits where a kernel takes them, as int8 everywhere else."""

from dataclasses import replace

import pytest
import torch

from qtoolkit import runtime
from qtoolkit.int8 import W8A8Linear
from qtoolkit.kernels import chained, selection


def layer() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (24, 64), generator=draw, dtype=torch.int8)
    scales = (torch.rand(24, 1, generator=draw) * 0.01 + 0.001).bfloat16()
    return chained.values(codes), scales, torch.randn(24, generator=draw)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that takes the chained grid, as a GPU's does."""
    own = replace(selection.REFERENCE_CHAINED, name="a kernel")
    monkeypatch.setattr(selection, "backends", lambda: (own, *selection.BACKENDS))


def test_a_kernel_for_the_grid_gives_what_int8_weights_give(kernel: None) -> None:
    integers, scales, bias = layer()
    made = runtime._chained_layer(integers, scales, bias, torch.float32)
    assert made is not None
    assert made.weight.numel() * made.weight.element_size() == integers.numel() // 2
    x = torch.randn(5, 64)
    torch.testing.assert_close(made(x), W8A8Linear(integers, scales, bias)(x), rtol=1e-5, atol=1e-5)


def test_other_int8_weights_are_left_alone(kernel: None) -> None:
    integers, scales, bias = layer()
    integers[0, 0] += 1
    assert runtime._chained_layer(integers, scales, bias, torch.float32) is None


def test_without_a_kernel_they_are_int8_weights() -> None:
    assert runtime._chained_layer(*layer(), torch.float32) is None


def test_a_plain_problem_never_meets_a_chained_backend_nor_the_other_way_round() -> None:
    plain = selection.Problem(64, 24, -1, torch.bfloat16, "cpu")
    assert selection.choose(plain).backend.grid is selection.Grid.PLAIN
    choice = selection.choose(replace(plain, grid=selection.Grid.CHAINED))
    assert choice.backend.layout == "neutral chained"
    assert any("plain codes only" in reason for reason in choice.refused.values())
