"""vLLM's CPU linear layers as its own layers call them: bf16 and W8A8 through oneDNN, W4A16, and its int4 W4A8."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Make = Callable[[int, int], Callable[[Tensor], Tensor]]


def bfloat16(k: int, n: int) -> Callable[[Tensor], Tensor]:
    """Make the unquantized layer: weights prepacked by oneDNN."""
    from vllm import _custom_ops as ops

    handler = ops.create_onednn_mm(torch.randn(n, k, dtype=torch.bfloat16).t(), 32)
    return lambda x: ops.onednn_mm(handler, x, None)


def w8a8(k: int, n: int) -> Callable[[Tensor], Tensor]:
    """Make the W8A8 layer: int8 weights per channel, activations quantized per token, symmetric."""
    from vllm import _custom_ops as ops

    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8).t()
    steps = torch.rand(n, 1) * 0.01
    handler = ops.create_onednn_scaled_mm(weight, steps, torch.bfloat16, True, False, 32)

    def run(x: Tensor, _kept: Tensor = steps) -> Tensor:  # the handler reads the scales where they lie
        codes, scales, zeros = ops.onednn_scaled_int8_quant(x, None, None, True)
        y = torch.empty(x.shape[0], n, dtype=x.dtype)
        return ops.onednn_scaled_mm(handler, codes, y, scales, zeros, None, None)

    return run


def w4a16(k: int, n: int) -> Callable[[Tensor], Tensor]:
    """Make the W4A16 layer that stock vLLM runs int4 checkpoints with, groups of 128."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import _get_isa_hint

    weight = torch.randint(-(2**31), 2**31 - 1, (n // 16, k * 2), dtype=torch.int32)  # 16 channels a block
    scales = (torch.rand(k // 128, n) * 0.01).bfloat16()
    hint = _get_isa_hint(torch.bfloat16)
    return lambda x: ops.cpu_gemm_wna16(x, weight, scales, None, None, 8, hint)


def int4_scaled_mm(k: int, n: int) -> Callable[[Tensor], Tensor]:
    """Make vLLM's own W4A8 product, which its layers use on machines with AMX only, groups of 128."""
    from vllm import _custom_ops as ops

    weight = torch.randint(-(2**31), 2**31 - 1, (k, n // 8), dtype=torch.int32)
    zeros = torch.full((k // 128, n // 8), -2004318072, dtype=torch.int32)  # 8 in every nibble
    scales = (torch.rand(k // 128, n) * 0.01).bfloat16()
    packed, own_zeros, own_scales = ops.convert_weight_packed_scale_zp(weight, zeros, scales, ops.CPUQuantAlgo.AWQ)
    return lambda x: ops.int4_scaled_mm_cpu(x, packed, own_zeros, own_scales, None)


def table() -> tuple[tuple[str, float, Make, bool], ...]:
    """Return (name, bits a weight value, maker, whether activations are int8) of what this vLLM build can run."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return ()
    current_platform.import_kernels()
    rows: tuple[tuple[str, str, float, Make, bool], ...] = (
        ("vllm-bf16", "create_onednn_mm_handler", 16, bfloat16, False),
        ("vllm-w8a8", "create_onednn_scaled_mm_handler", 8, w8a8, True),
        ("vllm-w4a16", "cpu_gemm_wna16", 4 + 16 / 128, w4a16, False),
        ("vllm-int4-scaled-mm", "int4_scaled_mm_cpu", 4 + 16 / 128, int4_scaled_mm, True),
    )
    return tuple((name, bits, make, integer) for name, op, bits, make, integer in rows if hasattr(torch.ops._C, op))
