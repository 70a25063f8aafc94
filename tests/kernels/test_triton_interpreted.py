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
    packed = layout.to_halves(codes)
    assert packed.shape == (layout.padded(n), layout.padded(k) // 2)
    assert torch.equal(layout.from_halves(packed, n, k), codes)
    chained = layout.to_halves(codes, chained=True)
    assert torch.equal(layout.from_halves(chained, n, k, chained=True), codes)


def test_a_chained_word_is_its_eight_weights() -> None:
    """Read as int8 it holds the odd inputs, shifted by a nibble the even ones."""
    codes = torch.randint(-8, 8, (128, 256), dtype=torch.int8)
    words = layout.to_halves(codes, chained=True).numpy().view(np.uint32)
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


def test_what_the_kernels_cannot_do_is_refused_in_words() -> None:
    assert backend.refuse(Problem(128, 64, -1, torch.bfloat16, "cpu")) == "needs a CUDA device"
    assert "groups" in (backend.refuse(Problem(128, 64, 32, torch.bfloat16, "cuda")) or "")
    assert "words of 8" in (backend.refuse(Problem(128, 64, 64, torch.bfloat16, "cuda", Grid.CHAINED)) or "")
    assert "whole number" in (backend.refuse(Problem(192, 64, 128, torch.bfloat16, "cuda")) or "")


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("part", ["quantizer", "per_channel", "chained", "grouped", "fused", "whole"])
def test_interpreted_kernels_follow_the_reference(part: str) -> None:
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    script = str(HERE / "triton_interpreted.py")
    done = subprocess.run([sys.executable, script, part], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
