"""The choice of tiles: every size gets one the kernel supports, and a measured table goes before the cost model."""

import json
from pathlib import Path

import pytest

from qtoolkit.kernels.cuda import plan
from qtoolkit.kernels.cuda.source import Tiling

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192), (136, 8), (1000, 2048)]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_size_has_a_tiling_that_the_kernel_supports(n: int, k: int, grouped: bool) -> None:
    for tokens in (1, 7, 16, 33, 64, 65, 100, 128, 200, 512, 5000):
        tiling = plan.choose(tokens, n, k, grouped)
        assert (tiling.tokens, tiling.blocks, tiling.resident) in {
            (s.tokens, s.blocks, s.resident) for s in plan.SHAPES
        }
        assert tiling.split <= plan.padded(k) // 128
        assert plan.padded(n) % (128 * tiling.blocks) == 0


def test_few_tokens_fill_the_card_by_sharing_the_inputs() -> None:
    tiling = plan.choose(1, 4096, 4096, False)
    assert tiling.tokens == 8
    assert 4096 // (128 * tiling.blocks) * tiling.split >= 128


def test_many_tokens_take_the_largest_tiles() -> None:
    assert plan.choose(4096, 8192, 8192, False) == Tiling(128, 2, 1, 1)


def test_a_measured_choice_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia_test.json").write_text(json.dumps({"tilings": {"16,4096,4096,0": [16, 1, 2, 2]}}))
    monkeypatch.setattr(plan, "TABLES", tmp_path)
    card = "NVIDIA Test 80GB"
    assert plan.choose(9, 4096, 4096, False, card) == Tiling(16, 1, 2, 2)
    assert plan.choose(9, 8192, 4096, False, card) == plan.choose(9, 8192, 4096, False)
