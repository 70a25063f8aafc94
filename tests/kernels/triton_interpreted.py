"""Run by test_triton_interpreted in a process whose Triton is the interpreter; a difference is an error."""

import sys

import torch

from qtoolkit.kernels import chained, reference
from qtoolkit.kernels.triton import backend, layout
from qtoolkit.kernels.triton.backend import Tiling


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


def products(group_sizes: tuple[int, ...], exact: bool, is_chained: bool = False) -> None:
    for tokens, n, k, split, group_size in [(1, 8, 256, 1, g) for g in group_sizes] + [
        (19, 136, 384 if g < 256 else 512, 2, g) for g in group_sizes
    ]:
        x = torch.randn(tokens, k)  # fp32: the interpreter narrows to bfloat16 by truncation
        codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
        scales = torch.rand(n, 1 if group_size == -1 else k // group_size) * 0.02
        bias = torch.randn(n) if tokens > 1 else None
        out = torch.full((tokens, n), torch.nan, dtype=x.dtype)
        weight, own_scales = layout.to_halves(codes, is_chained), layout.to_kernel_scales(scales, group_size)
        cut = Tiling(16, 64, split, 4, 3)
        tokens_in = backend.quantize(x, is_chained)
        backend.multiply(*tokens_in, weight, own_scales, bias, out, group_size, cut, is_chained)
        want = (chained if is_chained else reference).w4a8_linear(x, codes, scales, bias, group_size)
        if exact:
            assert torch.equal(out, want), (out - want).abs().max()
        else:  # shares add up in another order
            assert torch.allclose(out, want, rtol=1e-5, atol=1e-5), (out - want).abs().max()


if __name__ == "__main__":
    torch.manual_seed(0)
    cases = {
        "quantizer": quantizer,
        "per_channel": lambda: products((-1,), exact=True),
        "chained": lambda: products((-1,), exact=True, is_chained=True),
        "grouped": lambda: products((64, 128, 256), exact=False),
    }
    cases[sys.argv[1]]()
