"""The Triton kernels in Triton's interpreter against the exact reference, and their layout."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from qtoolkit.kernels import chained as chained_grid
from qtoolkit.kernels.selection import Grid, Problem
from qtoolkit.kernels.triton import backend, layout

HERE = Path(__file__).parent


@pytest.mark.parametrize(("n", "k"), [(128, 128), (8, 8), (200, 136)])
def test_packing_into_halves_loses_nothing(n: int, k: int) -> None:
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    for grid in Grid:
        packed = layout.to_halves(codes, grid)
        assert packed.shape == (layout.padded(n), layout.padded(k) // 2)
        assert torch.equal(layout.from_halves(packed, n, k, grid), codes)


def test_a_chained_word_is_its_eight_weights() -> None:
    """Read as int8 it holds the odd inputs, shifted by a nibble the even ones."""
    codes = torch.randint(-8, 8, (128, 256), dtype=torch.int8)
    words = layout.to_halves(codes, Grid.CHAINED).numpy().view(np.uint32)
    weights = chained_grid.values(codes).numpy()
    assert np.array_equal(words.view(np.int8), weights[:, 1::2])
    assert np.array_equal((words << np.uint32(4)).view(np.int8), weights[:, 0::2])


def test_groups_of_half_a_block_have_scales_for_whole_blocks() -> None:
    """The product reads two a block; behind the last group lay what the memory held before."""
    scales = torch.rand(40, 3)
    own = layout.to_kernel_scales(scales, 64)
    assert own.shape == (4, 128)
    assert torch.equal(own[:3, :40].T * 16, scales)
    assert not own[3].any()


def test_multiples_of_groups_stand_behind_the_bases() -> None:
    """As bytes; groups of half a block are read two at a time, so their number is even."""
    multiples = torch.randint(-15, 17, (40, 3))
    multiples[:, 1] = 16  # then no larger base folds the row
    multiples[:, 2] = 1
    base = 2.0**-9 * torch.arange(8, 16).repeat(5)
    for group_size, groups in ((64, 4), (128, 3)):
        own = layout.to_folded_scales(multiples * base[:, None], group_size)
        assert own.shape == (128 + groups * 32,)
        assert torch.equal(own[:40], base)
        rows = own[128:].view(torch.uint8).view(groups, 128)
        assert torch.equal(rows[:3, :40].T, multiples.to(torch.int8).view(torch.uint8))
        assert not rows[:, 40:].any()
        assert not rows[3:].any()


def test_what_the_kernels_cannot_do_is_refused_in_words() -> None:
    assert backend.refuse(Problem(128, 64, -1, torch.bfloat16, "cpu")) == "needs a CUDA device"
    assert "groups" in (backend.refuse(Problem(128, 64, 32, torch.bfloat16, "cuda")) or "")
    assert "words of 8" in (backend.refuse(Problem(128, 64, 64, torch.bfloat16, "cuda", Grid.CHAINED)) or "")
    assert backend.refuse(Problem(128, 64, -1, torch.bfloat16, "cuda", Grid.FOLDED)) == "only groups fold"
    assert "whole number" in (backend.refuse(Problem(192, 64, 128, torch.bfloat16, "cuda")) or "")


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("part", ["quantizer", "per_channel", "chained", "folded", "grouped", "fused", "whole"])
def test_interpreted_kernels_follow_the_reference(part: str) -> None:
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    script = str(HERE / "triton_interpreted.py")
    done = subprocess.run([sys.executable, script, part], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
