"""Plain-torch W4A8 arithmetic, exact in int32: what every backend must reproduce, and the fallback on any device."""

from __future__ import annotations

import torch
from torch import Tensor

ZERO_ROW = 2.0**-100  # rows whose absmax is below this count as zero: 127 / absmax must stay finite
EXACT_K = 16384  # 16384 * 127 * 8 < 2**24: up to this depth an fp32 product of the codes is an exact integer
EXACT_K_INT8 = 1024  # 1024 * 127 * 128 < 2**24: the same for int8 weights


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each token (row) to int8, symmetric, from its own absolute maximum.

    ``scale = absmax / 127`` and ``code = rint(x * (127 / absmax))``, both in fp32 with
    correctly rounded divisions, codes in -127..127. A row of
    zeros gets scale 0 and codes 0; a row with NaN or Inf gets scale NaN and codes 0, so its outputs become NaN.

    Args:
        x: bfloat16, float16 or float32 [..., k].

    Returns:
        codes int8 [..., k] and scales float32 [..., 1].
    """
    x = x.float()
    absmax = x.abs().amax(dim=-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    finite, zero = absmax.isfinite(), absmax < ZERO_ROW
    most = torch.full_like(absmax, 127.0)  # a tensor: torch turns division with a Python number into a reciprocal
    inverse = torch.where(finite & ~zero, most / absmax, 0.0)
    codes = torch.where(finite, (x * inverse).round().clamp(-127, 127), 0.0).to(torch.int8)
    scales = torch.where(zero, 0.0, torch.where(finite, absmax / most, torch.nan))
    return codes, scales


def exponential(x: Tensor) -> Tensor:
    """Return e**x in fp32, each operation rounded by itself, so that other code can give the same bits.

    ``x = n ln 2 + f`` with the polynomial of Cephes' expf for e**f; relative error below 2e-7 between -87 and 88, where
    x is held.
    """
    x = x.clamp(-87.0, 88.0)
    shifted = x * 1.44269504 + 12582912.0  # adding 1.5 * 2**23 rounds to the nearest integer
    n = shifted - 12582912.0
    f = (x - n * 0.693359375) - n * -2.12194440e-4
    p = torch.full_like(x, 1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * f + c
    return ((p * (f * f) + f) + 1.0) * ((shifted.view(torch.int32) + 127) << 23).view(torch.float32)


def silu_and_mul(x: Tensor) -> Tensor:
    """Return ``silu(gate) * up`` of x = [gate, up], computed in fp32 and rounded once.

    Args:
        x: bfloat16, float16 or float32 [..., 2 k].

    Returns:
        [..., k] in the dtype of x.
    """
    gate, up = x.float().chunk(2, dim=-1)
    return (gate / (1.0 + exponential(-gate)) * up).to(x.dtype)


def unpack_int4(packed: Tensor, k: int) -> Tensor:
    """Decode int4 codes from the checkpoint's layout.

    Args:
        packed: int32 [n, ceil(k / 8)], eight nibbles a word, lowest first, stored with +8.
        k: number of input features.

    Returns:
        int8 [n, k], values -8..7.
    """
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    nibbles = (packed.unsqueeze(-1) >> shifts) & 0xF  # [n, words, 8]
    return (nibbles.flatten(1)[:, :k] - 8).to(torch.int8)


def integer_product(a: Tensor, w: Tensor, depth: int = EXACT_K) -> Tensor:
    """Return the exact int32 product ``a @ w.T`` of int8 codes a [m, k] and int4 codes w [n, k].

    ``depth`` is how many inputs may be summed in fp32 at once: ``EXACT_K_INT8`` where w is int8.
    """
    total = torch.zeros(a.shape[0], w.shape[0], dtype=torch.int32, device=a.device)
    for start in range(0, a.shape[1], depth):
        part = slice(start, start + depth)
        total += (a[:, part].float() @ w[:, part].float().T).to(torch.int32)
    return total


def w4a8_linear(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, group_size: int, depth: int = EXACT_K
) -> Tensor:
    """Multiply per-token int8 activations with int4 weights, as an engine with int32 accumulators does.

    ``y[m, n] = a[m] * sum_g scales[n, g] * sum_{k in g} xq[m, k] * wq[n, k] + bias[n]``: the inner sum is exact in
    int32, the outer one runs in fp32 over ascending groups.

    Args:
        x: bfloat16, float16 or float32 [..., k].
        codes: int8 [n, k], values -8..7.
        scales: float [n, groups]; one column for per-channel scales.
        bias: [n] or None.
        group_size: inputs that share a scale; -1 for one scale per output channel.
        depth: see ``integer_product``; for codes of more than 4 bits.

    Returns:
        [..., n] in the dtype of x.
    """
    n, k = codes.shape
    rows = x.reshape(-1, k)
    xq, a = quantize_tokens(rows)  # [m, k], [m, 1]
    size = k if group_size == -1 else group_size
    y = torch.zeros(rows.shape[0], n, dtype=torch.float32, device=x.device)
    for g, start in enumerate(range(0, k, max(size, 1))):
        group = slice(start, start + size)
        y += integer_product(xq[:, group], codes[:, group], depth).float() * scales[:, g].float()
    y = y * a
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], n)
