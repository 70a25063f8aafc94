"""Run by test_triton_interpreted in a process whose Triton is the interpreter; a difference is an error."""

import sys
from dataclasses import replace

import torch

from qtoolkit.kernels import chained, folded, ops, reference
from qtoolkit.kernels.selection import Grid
from qtoolkit.kernels.triton import backend, layout
from qtoolkit.kernels.triton.backend import Tiling
from qtoolkit.packing.int4 import pack_int4


def quantizer() -> None:
    for tokens, k, dtype in [(3, 8, torch.bfloat16), (2, 1030, torch.float16), (5, 2048, torch.float32)]:
        x = torch.randn(tokens, k).to(dtype)
        x[0] = 0
        codes, scales = backend.quantize(x)
        want, want_scales = reference.quantize_tokens(x)
        assert torch.equal(codes[:, :k], want)
        assert not codes[:, k:].any()
        assert torch.equal(scales, want_scales[:, 0])
    x = torch.randn(3, 40)
    x[0, 3], x[1, 5] = torch.nan, torch.inf
    codes, scales = backend.quantize(x)
    want, want_scales = reference.quantize_tokens(x)
    assert torch.equal(codes[:, :40], want)
    assert torch.equal(scales.nan_to_num(-1), want_scales[:, 0].nan_to_num(-1))
    x = torch.randn(2, 3, 40).bfloat16()
    got, want_all = backend.quantize_tokens(x), reference.quantize_tokens(x)
    assert all(torch.equal(a, b) for a, b in zip(got, want_all, strict=True))
    assert backend.quantize_tokens(x[:0])[0].shape == (0, 3, 40)


def scales_of(n: int, groups: int, grid: Grid) -> torch.Tensor:
    if grid is Grid.FOLDED:
        return torch.randint(-15, 17, (n, groups)) * 2.0**-13 * torch.randint(8, 16, (n, 1))
    return torch.rand(n, groups) * 0.02


def prepared(
    codes: torch.Tensor, scales: torch.Tensor, group_size: int, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    return layout.prepare(pack_int4(codes), scales, codes.shape[1], group_size, grid)


def products(group_sizes: tuple[int, ...], exact: bool, grid: Grid = Grid.PLAIN) -> None:
    for tokens, n, k, split, group_size in [(1, 8, 256, 1, g) for g in group_sizes] + [
        (19, 136, 384 if g < 256 else 512, 2, g) for g in group_sizes
    ]:
        x = torch.randn(tokens, k)  # fp32: the interpreter narrows to bfloat16 by truncation
        codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
        scales = scales_of(n, 1 if group_size == -1 else k // group_size, grid)
        bias = torch.randn(n) if tokens > 1 else None
        out = torch.full((tokens, n), torch.nan, dtype=x.dtype)
        weight, own_scales = prepared(codes, scales, group_size, grid)
        cut = Tiling(16, 64, split, 4, 3)
        tokens_in = backend.quantize(x, grid)
        backend.multiply(*tokens_in, weight, own_scales, bias, out, group_size, cut, grid)
        exactly = {Grid.PLAIN: reference, Grid.CHAINED: chained, Grid.FOLDED: folded}[grid]
        want = exactly.w4a8_linear(x, codes, scales, bias, group_size)
        if exact:
            assert torch.equal(out, want), (out - want).abs().max()
        else:  # shares add up in another order
            assert torch.allclose(out, want, rtol=1e-5, atol=1e-5), (out - want).abs().max()


def fused() -> None:
    """Programs that quantize for themselves give the bits of the two launches; also rows of zeros, NaN and Inf."""
    plain, is_chained, is_folded = Grid
    for tokens, n, k, split, group_size, grid in [
        (1, 8, 144, 1, -1, plain), (5, 136, 528, 2, -1, plain), (3, 72, 272, 1, -1, is_chained),
        (4, 72, 528, 4, -1, is_chained), (16, 40, 384, 3, 128, plain), (2, 24, 192, 1, 64, plain),
        (16, 40, 384, 3, 128, is_folded), (2, 24, 192, 1, 64, is_folded),
    ]:  # fmt: skip
        x = torch.randn(tokens, k)
        if tokens > 3:
            x[0], x[1, 7], x[2, 3] = 0, torch.nan, torch.inf
        codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
        scales = scales_of(n, 1 if group_size == -1 else k // group_size, grid)
        weight, own_scales = prepared(codes, scales, group_size, grid)
        out, want = (torch.full((tokens, n), 7.0) for _ in range(2))
        cut = Tiling(16, 64, split, 4, 3)
        some = torch.full((tokens,), torch.nan)
        backend.multiply(x, some, weight, own_scales, None, out, group_size, replace(cut, fused=True), grid)
        backend.multiply(*backend.quantize(x, grid), weight, own_scales, None, want, group_size, cut, grid)
        assert torch.equal(out.nan_to_num(-1), want.nan_to_num(-1)), (out - want).abs().max()
        assert out.isnan().any(1).sum() == (2 if tokens > 3 else 0)


def whole() -> None:
    """The operator as a model calls it: any number of tokens, none too, bias, every dtype that activations have."""
    n, k = 24, 144
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    scales = torch.rand(n, 1) * 0.02
    weight, own_scales = layout.to_halves(codes), layout.to_kernel_scales(scales, -1)
    for shape in ((0, k), (2, 0, k), (1, k), (3, k), (2, 9, k), (33, k)):
        for bias in (None, torch.randn(n)):
            x = torch.randn(shape)
            want = reference.w4a8_linear(x, codes, scales, bias, -1)
            assert torch.equal(ops.w4a8_linear(x, weight, own_scales, bias, n, -1, "halves"), want)
    for dtype, unit in ((torch.float16, 2**-10), (torch.bfloat16, 2**-7)):  # bfloat16 is narrowed by truncation here
        x, bias = torch.randn(3, k).to(dtype), torch.randn(n).to(dtype)
        got = ops.w4a8_linear(x, weight, own_scales, bias, n, -1, "halves")
        want = reference.w4a8_linear(x, codes, scales, bias, -1)
        assert got.dtype == dtype
        assert torch.allclose(got.float(), want.float(), rtol=unit, atol=0)


if __name__ == "__main__":
    torch.manual_seed(0)
    cases = {
        "quantizer": quantizer,
        "per_channel": lambda: products((-1,), exact=True),
        "chained": lambda: products((-1,), exact=True, grid=Grid.CHAINED),
        "folded": lambda: products((64, 128, 256), exact=True, grid=Grid.FOLDED),
        "fused": fused,
        "whole": whole,
        "grouped": lambda: products((64, 128, 256), exact=False),
    }
    cases[sys.argv[1]]()
