"""N:M storage: the size theory says, refusals, and damaged tensors."""

from __future__ import annotations

import pytest
import torch

from qtoolkit.errors import CheckpointError
from qtoolkit.packing.bits import pack_bits, unpack_bits
from qtoolkit.packing.nm import PACKER
from qtoolkit.vision.pattern import Pattern


def sparse(n: int, k: int, pattern: str) -> torch.Tensor:
    kept, size = Pattern(pattern=pattern).nm
    blocks = torch.randn(n, k // size, size, generator=torch.Generator().manual_seed(0))
    blocks[..., kept:] = 0
    return blocks.view(n, k)


@pytest.mark.parametrize(("pattern", "bits"), [("2:4", 2 * 2), ("4:8", 4 * 3), ("1:4", 2), ("1:16", 4), ("3:5", 3 * 3)])
def test_places_take_n_times_log2_m_bits_a_block(pattern: str, bits: int) -> None:
    kept, size = Pattern(pattern=pattern).nm
    matrix = sparse(8, size * 10, pattern)
    tensors = PACKER.pack(PACKER.read(matrix, Pattern(pattern=pattern)))
    assert tensors["weight_places"].numel() == (8 * 10 * bits + 7) // 8
    assert tensors["weight_values"].numel() == 8 * 10 * kept


@pytest.mark.parametrize("width", range(1, 9))
def test_bits_survive_at_every_width(width: int) -> None:
    numbers = torch.randint(0, 1 << width, (101,), dtype=torch.uint8)
    assert torch.equal(unpack_bits(pack_bits(numbers, width), width, 101), numbers)


def test_a_matrix_without_the_pattern_is_refused() -> None:
    with pytest.raises(ValueError, match="2:4"):
        PACKER.read(torch.ones(2, 8), Pattern(pattern="2:4"))
    assert PACKER.refuse(8, 27, Pattern(pattern="2:4")) == "27 inputs are not a multiple of 4"


def test_blocks_with_fewer_nonzeros_are_stored_with_zeros() -> None:
    matrix = torch.zeros(1, 8)
    matrix[0, 7] = 3.0
    weight = PACKER.read(matrix, Pattern(pattern="2:4"))
    assert weight.places.tolist() == [[[0, 1], [0, 3]]]
    assert torch.equal(weight.dequantize(), matrix)


def test_damaged_tensors_are_refused() -> None:
    tensors = PACKER.pack(PACKER.read(sparse(4, 15, "2:5"), Pattern(pattern="2:5")))
    for name, bad in {
        "weight_values": tensors["weight_values"][:-1],
        "weight_places": tensors["weight_places"][:-1],
        "weight_shape": torch.tensor([4, 16, 2, 5]),
    }.items():
        with pytest.raises(CheckpointError, match="belong together"):
            PACKER.unpack({**tensors, name: bad})
    with pytest.raises(CheckpointError, match="places"):
        PACKER.unpack({**tensors, "weight_places": torch.full_like(tensors["weight_places"], 255)})
