"""The operator of a mixture's experts: the reference's numbers, a fake that fits, tokens that nobody else disturbs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtoolkit.kernels import reference
from qtoolkit.kernels.experts import w4a8_experts
from qtoolkit.packing.int4 import pack_int4

EXPERTS, HIDDEN, INNER, TOP = 5, 64, 32, 2


def problem(tokens: int, group_size: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the operator's tensors, and the codes they were packed from."""
    draw = torch.Generator().manual_seed(tokens)

    def weights(n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
        codes = torch.randint(-8, 8, (EXPERTS, n, k), generator=draw, dtype=torch.int8)
        scales = torch.rand(EXPERTS, n, 1 if group_size < 0 else k // group_size, generator=draw) * 0.01 + 0.001
        return codes, torch.stack([pack_int4(expert) for expert in codes]), scales

    first, packed_first, first_scales = weights(2 * INNER, HIDDEN)
    second, packed_second, second_scales = weights(HIDDEN, INNER)
    x = torch.randn(tokens, HIDDEN, generator=draw)
    chosen = torch.stack([torch.randperm(EXPERTS - 1, generator=draw)[:TOP] for _ in range(max(tokens, 1))])[:tokens]
    share = torch.rand(tokens, TOP, generator=draw)
    return (x, chosen, share, packed_first, first_scales, packed_second, second_scales), (first, second)


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_each_token_gets_the_weighted_sum_of_its_experts(tokens: int, group_size: int) -> None:
    given, (first, second) = problem(tokens, group_size)
    x, chosen, share, _, first_scales, _, second_scales = given
    expected = torch.zeros_like(x)
    for token, (row, ids) in enumerate(zip(x, chosen.tolist(), strict=True)):
        for place, e in enumerate(ids):
            both = reference.w4a8_linear(row[None], first[e], first_scales[e], None, group_size)
            made = reference.w4a8_linear(reference.silu_and_mul(both), second[e], second_scales[e], None, group_size)
            expected[token] += share[token, place] * made[0]
    found = w4a8_experts(*given, INNER, group_size)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # sums of TOP terms may be in another order


def test_a_compiler_sees_one_operator_whatever_is_routed_where() -> None:
    given, _ = problem(9, 32)
    names = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.qtoolkit.w4a8_experts.default, (*given, INNER, 32, "neutral", "neutral"), test_utils=names
    )
