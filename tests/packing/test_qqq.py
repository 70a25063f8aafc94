"""The QQQ layout against its index map, element by element, and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from qtoolkit.errors import CheckpointError
from qtoolkit.packing import qqq
from qtoolkit.scheme import CHANNEL, Scheme
from qtoolkit.stages import QuantizedWeight


def position(k: int, n: int, grouped: bool) -> tuple[int, int, int]:
    """Return row of B, word column and nibble of weight (k, n): the map as the original files have it."""
    tile, r = divmod(k, 16)
    t, b = r % 4, (n % 16) // 8
    word = 128 * (n // 64) + 16 * (n % 8) + 4 * (r // 4) + (n % 64) // 16
    nibble = 4 * (t % 2) + 2 * b + t // 2 if grouped else 2 * t + 1 - b
    return tile, word, nibble


def random_weight(n: int, k: int, groups: int, seed: int, dtype: torch.dtype) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
    scales = (torch.rand(n, groups, generator=generator) * 0.05 + 1e-4).to(dtype)
    return QuantizedWeight(codes, scales)


@pytest.mark.parametrize("grouped", [False, True])
def test_every_code_lies_where_the_index_map_says(grouped: bool) -> None:
    codes = random_weight(128, 48, 1, 0, torch.float32).codes
    packed = qqq.pack_codes(codes, grouped)
    assert packed.shape == (3, 256)
    for n in range(128):
        for k in range(48):
            row, word, nibble = position(k, n, grouped)
            stored = int(packed[row, word]) >> (4 * nibble) & 0xF
            code = int(codes[n, k])
            assert stored == (code + 8 if grouped else code & 0xF), (k, n)


@pytest.mark.parametrize("grouped", [False, True])
def test_the_index_map_uses_every_nibble_once(grouped: bool) -> None:
    places = {position(k, n, grouped) for k in range(32) for n in range(128)}
    assert places == {(row, word, nibble) for row in range(2) for word in range(256) for nibble in range(8)}


@given(
    n=st.integers(1, 4).map(lambda tiles: 64 * tiles),
    k=st.integers(2, 4).map(lambda tiles: 128 * tiles),
    grouped=st.booleans(),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
)
@settings(max_examples=40, deadline=None)
def test_unpacking_returns_codes_and_scales_and_packing_again_the_same_bytes(
    n: int, k: int, grouped: bool, seed: int, dtype: torch.dtype
) -> None:
    weight = random_weight(n, k, k // 128 if grouped else 1, seed, dtype)
    tensors = qqq.PACKER.pack(weight)
    back = qqq.PACKER.unpack(tensors)
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scales, weight.scales.float())
    again = qqq.PACKER.pack(back)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_scales_are_permuted_in_blocks_of_32_and_64() -> None:
    weight = random_weight(128, 256, 2, 0, torch.float16)
    tensors = qqq.PACKER.pack(weight)
    for n in range(128):
        channel = n // 32 * 32 + 8 * ((n % 8) // 2) + 2 * ((n % 32) // 8) + n % 2
        group = n // 64 * 64 + 8 * (n % 8) + (n % 64) // 8
        for g in range(2):
            stored = tensors["s_group"][g, group].float() * tensors["s_channel"][0, channel]
            assert stored == weight.scales[n, g].float()


def test_the_original_kernel_would_not_overflow_int8() -> None:
    weight = random_weight(64, 512, 4, 3, torch.float16)
    s_channel, s_group = qqq.split_scales(weight)
    plain = QuantizedWeight(weight.codes, qqq.scales(s_channel, s_group)).dequantize()
    channel = s_channel[0, qqq._channel_columns(64)].unsqueeze(1)
    assert (plain / channel).abs().max() <= 127
    assert (plain / channel).abs().amax(dim=1).min() > 63  # and at least half of its range is used


@pytest.mark.parametrize("cut", [slice(0, 64), slice(64, 192)])
def test_columns_of_a_file_are_columns_of_the_weight(cut: slice) -> None:
    weight = random_weight(256, 128, 1, 1, torch.float16)
    packed = qqq.pack_codes(weight.codes, grouped=True)
    assert torch.equal(qqq.unpack_codes(packed[:, 2 * cut.start : 2 * cut.stop], grouped=True), weight.codes[cut])


def test_rows_of_a_file_are_inputs_of_the_weight() -> None:
    weight = random_weight(64, 256, 1, 1, torch.float16)
    packed = qqq.pack_codes(weight.codes, grouped=False)
    assert torch.equal(qqq.unpack_codes(packed[8:], grouped=False), weight.codes[:, 128:])


@pytest.mark.parametrize(
    ("n", "k", "group_size", "words"),
    [
        (64, 128, CHANNEL, None),
        (128, 64, CHANNEL, None),
        (64, 256, 128, None),
        (64, 64, CHANNEL, "multiples of 64 and 128"),
        (64, 128, 64, "not groups of 64"),
        (128, 192, 128, "groups of 128"),
        (128, 128, 128, "two or more groups"),
    ],
)
def test_refuse_says_which_shapes_do_not_fit(n: int, k: int, group_size: int, words: str | None) -> None:
    reason = qqq.PACKER.refuse(n, k, Scheme(group_size=group_size))
    assert (reason is None) == (words is None)
    assert words is None or words in str(reason)


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    tensors = qqq.PACKER.pack(random_weight(64, 256, 2, 0, torch.float16))
    with pytest.raises(CheckpointError, match="do not belong together"):
        qqq.PACKER.unpack({**tensors, "s_group": tensors["s_group"][:1]})
