"""Binary storage: one bit a weight, whole words a row, lowest bit first; damage is noticed."""

from __future__ import annotations

import pytest
import torch

from qtoolkit.errors import CheckpointError
from qtoolkit.packing.binary import PACKER, BinaryWeight


def weight(n: int, k: int) -> BinaryWeight:
    generator = torch.Generator().manual_seed(k)
    return BinaryWeight((torch.randint(0, 2, (n, k), generator=generator) * 2 - 1).to(torch.int8), torch.rand(n))


@pytest.mark.parametrize("k", [1, 63, 64, 65, 144, 576])
def test_a_row_takes_whole_words(k: int) -> None:
    tensors = PACKER.pack(weight(5, k))
    assert tensors["weight_words"].shape == (5, -(-k // 64))
    assert tensors["weight_words"].dtype == torch.int64


def test_the_first_input_is_the_lowest_bit() -> None:
    signs = -torch.ones(1, 70, dtype=torch.int8)
    signs[0, [0, 63, 65]] = 1
    words = PACKER.pack(BinaryWeight(signs, torch.ones(1)))["weight_words"]
    assert [word % 2**64 for word in words[0].tolist()] == [1 + 2**63, 2]


def test_damaged_tensors_are_refused() -> None:
    tensors = PACKER.pack(weight(4, 100))
    for name, bad in {
        "weight_words": tensors["weight_words"][:, :1],
        "weight_scale": tensors["weight_scale"][:3],
        "weight_shape": torch.tensor([4, 200]),
    }.items():
        with pytest.raises(CheckpointError, match="belong together"):
            PACKER.unpack({**tensors, name: bad})
