"""Every vision form takes the bytes that theory gives it: numbers, indices, and a stated few for its shape."""

from __future__ import annotations

import math

import pytest
import torch

from qtoolkit import registry
from qtoolkit.packing.binary import BinaryWeight
from qtoolkit.packing.debut import ButterflyWeight
from qtoolkit.vision import butterfly
from qtoolkit.vision.pattern import Pattern

N, INPUTS, TAPS = 32, 48, 9
K = INPUTS * TAPS
FLOAT = 4


def size(kind: str, weight: object) -> int:
    return sum(t.numel() * t.element_size() for t in registry.packers.get(kind).pack(weight).values())


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (4, 8), (1, 16)])
def test_n_of_m_takes_the_kept_values_and_log2_m_bits_for_each(kept: int, of: int) -> None:
    matrix = torch.randn(N, K).view(N, -1, of)
    matrix[..., kept:] = 0
    weight = registry.packers.get("nm").read(matrix.view(N, K), Pattern(pattern=f"{kept}:{of}"), INPUTS)
    values = N * K * kept // of
    assert size("nm", weight) == values * FLOAT + math.ceil(values * math.log2(of) / 8) + 4 * 8


def test_blocks_take_the_kept_ones_and_one_index_a_group_and_channel() -> None:
    rows, kept = 16, 12
    cube = torch.randn(N // rows, rows, TAPS, INPUTS)
    cube[..., kept:] = 0
    weight = registry.packers.get("block").read(cube.view(N, K), Pattern(pattern="1x16", rate=0.75), INPUTS)
    assert size("block", weight) == N * TAPS * kept * FLOAT + N // rows * kept * 4 + 4 * 8


def test_filters_take_what_is_left_and_two_lists_of_indices() -> None:
    cube = torch.randn(N, TAPS, INPUTS)
    cube[20:] = 0
    cube[:, :, 30:] = 0
    weight = registry.packers.get("filter").read(cube.view(N, K), Pattern(pattern="filter", rate=0.3), INPUTS)
    assert size("filter", weight) == 20 * TAPS * 30 * FLOAT + (20 + 30) * 4 + 3 * 8


def test_signs_take_a_bit_each_in_whole_words_and_a_scale_an_output() -> None:
    weight = BinaryWeight(torch.ones(N, K, dtype=torch.int8), torch.ones(N))
    assert size("binary", weight) == N * math.ceil(K / 64) * 8 + N * FLOAT + 2 * 8
    folded = BinaryWeight(weight.signs, weight.scales, torch.zeros(N, dtype=torch.int32))
    assert size("binary", folded) == size("binary", weight) + N * 4


def test_butterflies_take_their_nonzeros_and_twenty_bytes_a_factor() -> None:
    chain = butterfly.chain(400, ((8, 25, 1), (2, 2, 8), (2, 2, 16), (2, 2, 32), (2, 2, 64)))  # LeNet's fc1
    nonzeros = 128 * 25 + 4 * 128 * 2  # p s of every factor
    assert size("debut", ButterflyWeight(chain, torch.zeros(nonzeros))) == nonzeros * FLOAT + 5 * 20
