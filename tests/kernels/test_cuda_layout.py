"""The Hopper layouts: fragment order and swizzle against their definitions, and their inverses."""

import numpy as np
import pytest
import torch

from qtoolkit.kernels import chained, folded
from qtoolkit.kernels.cuda import layout
from qtoolkit.kernels.selection import Grid
from qtoolkit.packing.int4 import pack_int4


def random_codes(n: int, k: int) -> torch.Tensor:
    return torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(n + k))


@pytest.mark.parametrize(("n", "k"), [(128, 128), (8, 8), (200, 136), (384, 256)])
def test_fragment_order_loses_nothing(n: int, k: int) -> None:
    codes = random_codes(n, k)
    for grid in Grid:
        assert torch.equal(layout.from_fragments(layout.to_fragments(codes, grid), n, k, grid), codes)


def test_a_threads_sixteen_bytes_are_two_steps_of_its_operand_registers() -> None:
    """Register r, byte b of thread t holds row 16 (t/32) + (t%32)/4 + 8 (r%2), k 4 (t%4) + b + 16 (r/2) of m64k32."""
    n, k = 256, 256
    codes = random_codes(n, k)
    weight = layout.to_fragments(codes)
    places = [(0, 0, 0, 0, 0), (1, 0, 1, 77, 1), (0, 1, 1, 127, 3), (1, 1, 0, 34, 2)]
    for row_chunk, k_block, block, thread, step in places:
        at = block * 4096 + (step // 2) * 2048 + thread * 16 + (step % 2) * 8
        words = weight[row_chunk, k_block, at : at + 8]
        for r in range(4):
            for byte in range(4):
                packed = int(words[4 * (r // 2) + byte])
                nibble = packed >> 4 if r % 2 == 0 else packed & 15
                row = row_chunk * 128 + block * 64 + 16 * (thread // 32) + thread % 32 // 4 + 8 * (r % 2)
                column = k_block * 128 + step * 32 + 4 * (thread % 4) + byte + 16 * (r // 2)
                assert (nibble ^ 8) - 8 == codes[row, column]


def test_a_chained_threads_sixteen_bytes_are_its_operand_as_they_are_and_shifted() -> None:
    """Step 0 of a pair reads the odd inputs of 64 in order, step 1 the even ones; bytes are the weights themselves."""
    n, k = 128, 256
    codes = random_codes(n, k)
    weights = chained.values(codes)
    fragments = layout.to_fragments(codes, Grid.CHAINED).numpy()
    for k_block, block, thread, pair in [(0, 0, 0, 0), (1, 0, 77, 1), (1, 1, 127, 0), (0, 1, 34, 1)]:
        at = block * 4096 + pair * 2048 + thread * 16
        words = fragments[0, k_block, at : at + 16].view(np.uint32)
        for step, registers in enumerate((words, words << np.uint32(4))):
            operand = registers.view(np.int8).reshape(4, 4)  # register, byte
            for r in range(4):
                for byte in range(4):
                    row = block * 64 + 16 * (thread // 32) + thread % 32 // 4 + 8 * (r % 2)
                    place = 4 * (thread % 4) + byte + 16 * (r // 2)
                    column = k_block * 128 + pair * 64 + 2 * place + (1 - step)
                    assert operand[r, byte] == weights[row, column]


def test_a_folded_threads_words_and_multiples_are_its_operand() -> None:
    """Nibbles times the row's multiple plus an offset are 128 + code * multiple in each byte: no byte lends."""
    n, k, group_size = 200, 512, 256
    codes = random_codes(n, k)
    multiples = torch.randint(-15, 17, (n, 2), dtype=torch.int8)
    multiples[:2] = torch.tensor([[16, 0], [-15, 16]])
    codes[0, :8], codes[1, :8], codes[1, 256:264] = 7, -8, -8  # large bytes, 240 and 248, and the smallest, 0
    weight = layout.with_multiples(layout.to_fragments(codes, Grid.FOLDED), multiples, group_size)
    assert weight.shape == (2, 4, 8192 + 128)
    assert torch.equal(layout.from_fragments(weight, n, k, Grid.FOLDED), codes)
    assert torch.equal(layout.multiples_of(weight, n, group_size), multiples)
    assert not weight[1, :, 8192 + n - 128 :].any()  # rows behind the last
    whole = torch.nn.functional.pad(folded.integers(codes, multiples, group_size), (0, 0, 0, 56)).numpy()
    for row_chunk, k_block, block, thread, step in [
        (0, 0, 0, 0, 0),
        (1, 2, 0, 77, 1),
        (0, 1, 1, 127, 3),
        (0, 3, 1, 34, 2),
    ]:
        at = block * 4096 + (step // 2) * 2048 + thread * 16 + (step % 2) * 8
        words = weight[row_chunk, k_block, at : at + 8].numpy().view(np.uint32)
        upper = block * 64 + 16 * (thread // 32) + thread % 32 // 4
        for r in range(4):
            row = upper + 8 * (r % 2)
            m = (
                weight[row_chunk, k_block, 8192 + row : 8193 + row].view(torch.int8).numpy().astype(np.uint32)
            )  # modulo 2^32
            nibbles = (words[r // 2] >> np.uint32(0 if r % 2 else 4)) & np.uint32(0x0F0F0F0F)
            operand = (nibbles * m + (np.uint32(0x80808080) - m * np.uint32(0x08080808))).view(np.uint8)
            column = k_block * 128 + step * 32 + 4 * (thread % 4) + 16 * (r // 2)
            want = whole[row_chunk * 128 + row, column : column + 4].astype(int) + 128
            assert operand.tolist() == want.tolist()


def test_a_weight_is_prepared_folded_or_refused() -> None:
    codes, multiples = random_codes(40, 256), torch.randint(-15, 17, (40, 2))
    scales = multiples * 2.0**-9 * torch.arange(8, 16).repeat(5)[:, None]
    weight, own = layout.prepare(pack_int4(codes), scales, 256, 128, Grid.FOLDED)
    assert torch.equal(layout.multiples_of(weight, 40, 128) * own[0, :40, None], scales)  # nothing is divided by 16
    assert own.shape == (1, 128)
    with pytest.raises(ValueError, match="no small multiples"):
        layout.prepare(pack_int4(codes), torch.rand(40, 2), 256, 128, Grid.FOLDED)


def test_chained_tokens_bring_the_odd_inputs_first() -> None:
    codes = torch.randint(-127, 128, (3, 256), dtype=torch.int8)
    swizzled = layout.to_swizzled(codes, Grid.CHAINED)
    for token, k in [(0, 0), (1, 17), (2, 130), (0, 255), (2, 127)]:
        address = token * 128 + k % 128 // 64 * 64 + (32 if k % 2 == 0 else 0) + k % 64 // 2
        address ^= (address >> 7 & 7) << 4
        assert swizzled[k // 128].flatten()[address] == codes[token, k]


def test_swizzled_tokens_stand_where_the_tensor_core_looks_for_them() -> None:
    codes = torch.randint(-127, 128, (21, 256), dtype=torch.int8)
    swizzled = layout.to_swizzled(codes)
    assert swizzled.shape == (2, 24, 128)
    for token, k in [(0, 0), (3, 17), (9, 130), (20, 255), (7, 127)]:
        address = token * 128 + k % 128
        address ^= (address >> 7 & 7) << 4  # the hardware's 128-byte swizzle works on address bits
        assert swizzled[k // 128].flatten()[address] == codes[token, k]


def test_scales_lose_nothing_to_the_factor_of_sixteen() -> None:
    scales = torch.rand(40, 3).bfloat16()
    own = layout.to_kernel_scales(scales, 128)
    assert own.shape == (3, 128)
    assert torch.equal(own[:, :40].T * 16, scales.float())
    assert not own[:, 40:].any()


def test_preparing_in_parts_is_preparing() -> None:
    codes = random_codes(4096 + 40, 136)
    words = (codes.to(torch.int32) + 8).view(codes.shape[0], -1, 8) << torch.arange(0, 32, 4, dtype=torch.int32)
    weight, scales = layout.prepare(words.sum(-1, dtype=torch.int32), torch.ones(codes.shape[0], 1), 136, -1)
    assert torch.equal(weight, layout.to_fragments(codes))
    assert scales.shape == (1, 4224)
