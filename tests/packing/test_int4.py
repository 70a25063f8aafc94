"""The standard int4 layout against its definition, and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from qtoolkit.errors import CheckpointError
from qtoolkit.packing.int4 import PACKER, pack_int4, unpack_int4
from qtoolkit.stages import QuantizedWeight


@given(n=st.integers(1, 20), k=st.integers(1, 70), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_unpacking_returns_the_codes_for_any_shape(n: int, k: int, seed: int) -> None:
    codes = torch.randint(-8, 8, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack_int4(codes)
    assert packed.shape == (n, -(-k // 8))
    assert torch.equal(unpack_int4(packed, k), codes)


def test_the_first_code_is_the_lowest_nibble_stored_with_8_added() -> None:
    codes = torch.tensor([[-8, -7, 0, 1, 2, 3, 7, -1]], dtype=torch.int8)
    stored = int(pack_int4(codes)[0, 0]) & 0xFFFFFFFF
    assert [stored >> shift & 0xF for shift in range(0, 32, 4)] == [0, 1, 8, 9, 10, 11, 15, 7]


@pytest.mark.parametrize("code", [-9, 8])
def test_a_code_outside_int4_is_refused(code: int) -> None:
    with pytest.raises(ValueError, match=r"-8\.\.7"):
        pack_int4(torch.full((2, 8), code, dtype=torch.int8))


def test_compressed_tensors_reads_the_same_codes() -> None:
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    codes = torch.randint(-8, 8, (5, 24), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    assert torch.equal(unpack_from_int32(pack_int4(codes), 4, torch.Size([5, 24])).to(torch.int8), codes)


def test_scales_that_do_not_divide_the_inputs_are_refused() -> None:
    tensors = PACKER.pack(QuantizedWeight(torch.zeros(4, 24, dtype=torch.int8), torch.ones(4, 3)))
    with pytest.raises(CheckpointError, match="do not belong together"):
        PACKER.unpack({**tensors, "weight_scale": torch.ones(4, 5)})
