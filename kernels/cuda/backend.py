"""The Hopper backend: refuses what the kernels cannot do, prepares weights, and launches quantizer and product."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from qtoolkit.kernels import ops
from qtoolkit.kernels.cuda import compiler, driver, layout, plan, source
from qtoolkit.kernels.selection import Backend, Grid, Problem

CAPABILITY = (9, 0)
MIXED_SIGNS = (12, 4)  # the first CUDA with PTX 8.4, which has wgmma .u8.s8
MAX_K = 65536  # a token's inputs stay in one block's registers while it is quantized
LAYOUTS = {Grid.PLAIN: "hopper", Grid.CHAINED: "hopper chained", Grid.FOLDED: "hopper folded"}
DTYPES = (torch.bfloat16, torch.float16)


class Arguments(ctypes.Structure):
    """The linear kernel's argument, field for field its ``struct Problem``."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("token_scales", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("tokens", ctypes.c_int),
        ("tokens8", ctypes.c_int),
        ("n", ctypes.c_int),
        ("n_padded", ctypes.c_int),
        ("k_blocks", ctypes.c_int),
        ("group_blocks", ctypes.c_int),
        ("split", ctypes.c_int),
        ("k", ctypes.c_int),
        ("parts", ctypes.c_void_p),
        ("arrived", ctypes.c_void_p),
    )


def refuse(problem: Problem) -> str | None:
    """Return why these kernels cannot run ``problem`` here, or None."""
    if problem.device != "cuda":
        return "needs a CUDA device"
    if problem.dtype not in DTYPES:
        return f"activations must be bfloat16 or float16, not {problem.dtype}"
    if reason := refuse_shape(problem):
        return reason
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    if torch.cuda.get_device_capability() != CAPABILITY:
        return f"written for compute capability 9.0 (H100, H200), not {torch.cuda.get_device_capability()}"
    found = compiler.version()
    if found is None:
        return "no CUDA compiler: neither NVRTC (nvidia-cuda-nvrtc) nor nvcc was found"
    if problem.grid is Grid.FOLDED and tuple(map(int, found.split()[1].split("."))) < MIXED_SIGNS:
        return f"products of unsigned weights with signed tokens need a compiler of CUDA 12.4 or newer, not {found}"
    return None


def has_sums_of_groups(group_size: int, grid: Grid) -> bool:
    """Return whether a product scales each group's sum by itself, in float32; folded ones have one sum a row."""
    return group_size != -1 and grid is not Grid.FOLDED


def refuse_shape(problem: Problem) -> str | None:
    """Return why these kernels cannot run a layer of this shape on any card, or None."""
    if problem.k % 8 or not 8 <= problem.k <= MAX_K:
        return f"k must be a multiple of 8 from 8 to {MAX_K}, not {problem.k}"
    if problem.n % 8 or problem.n < 8:
        return f"n must be a multiple of 8, not {problem.n}"
    if problem.grid is Grid.FOLDED and problem.group_size == -1:
        return "only groups fold"
    if problem.group_size != -1 and (problem.group_size % layout.K_BLOCK or problem.k % problem.group_size):
        return f"groups must be whole blocks of {layout.K_BLOCK} inputs, not {problem.group_size} of {problem.k}"
    return None


def prepare(packed: Tensor, scales: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Permute a checkpoint's weight into fragment order, on the device it lies on; waits until it is written.

    A product reads weights and group scales before the launch ahead of it has ended: that must not be the one which
    writes them.
    """
    own = layout.prepare(packed, scales, problem.k, problem.group_size, problem.grid)
    if own[0].is_cuda:
        torch.cuda.current_stream(own[0].device).synchronize()
    return own


@dataclass(frozen=True)
class Place:
    """Where a launch goes: the card's name, its multiprocessors, the stream, and how to load a kernel there."""

    card: str
    multiprocessors: int
    stream: int
    load: Callable[[source.Kernel], driver.Launch]


@lru_cache(maxsize=16)
def _card(device: int) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count


@contextmanager
def place_of(x: Tensor) -> Iterator[Place]:
    """Make the device of ``x`` current and yield it with its current stream."""
    device = x.device.index if x.device.index is not None else torch.cuda.current_device()
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        yield Place(*_card(device), stream, lambda kernel: driver.load(kernel, device))


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def quantize(x: Tensor, place: Place, grid: Grid = Grid.PLAIN) -> tuple[Tensor, Tensor]:
    """Launch the quantizer for x [tokens, k]; return swizzled codes (``layout.to_swizzled``) and scales [1, tokens8].

    For FOLDED weights a second row of scales is, in their bits, the int32 sum of each token's codes.
    """
    tokens, k = x.shape
    tokens8, k_padded = -(-tokens // 8) * 8, layout.padded(k)
    codes = torch.empty(k_padded // layout.K_BLOCK, tokens8, layout.K_BLOCK, dtype=torch.int8, device=x.device)
    scales = torch.empty(2 if grid is Grid.FOLDED else 1, tokens8, dtype=torch.float32, device=x.device)
    arguments = (_pointer(x), _pointer(codes), _pointer(scales), *map(ctypes.c_int, (tokens8, k, k_padded)))
    place.load(source.quantize(k, x.dtype == torch.float16, grid))(tokens, 1, arguments, place.stream, False)
    return codes, scales


def multiply(
    codes: Tensor,
    token_scales: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out: Tensor,
    group_size: int,
    tiling: source.Tiling,
    place: Place,
    grid: Grid = Grid.PLAIN,
) -> None:
    """Launch the product of quantized tokens with a prepared weight into out [tokens, n]; bias has the dtype of out."""
    tokens8 = token_scales.shape[1]
    tensors = (weight.data_ptr(), scales.data_ptr(), codes.data_ptr(), token_scales.data_ptr(), None)
    _launch(tensors, weight, bias, out, tokens8, 0, group_size, tiling, place, grid, share=0)


def multiply_floats(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out: Tensor,
    group_size: int,
    tiling: source.Tiling,
    place: Place,
    grid: Grid = Grid.PLAIN,
) -> None:
    """Launch the product that quantizes x [tokens, k] itself; ``tiling`` is fused and holds all tokens."""
    tokens, k = x.shape
    tensors = (weight.data_ptr(), scales.data_ptr(), None, None, x.data_ptr())
    share = tiling.share(weight.shape[1])
    _launch(tensors, weight, bias, out, -(-tokens // 8) * 8, k, group_size, tiling, place, grid, share)


def _launch(
    tensors: tuple[int | None, ...],
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tokens8: int,
    k: int,
    group_size: int,
    tiling: source.Tiling,
    place: Place,
    grid: Grid,
    share: int,
) -> None:
    tokens, n = out.shape
    row_chunks, k_blocks, _ = weight.shape
    grouped = has_sums_of_groups(group_size, grid)
    tiles = row_chunks // tiling.blocks * -(-tokens // tiling.tokens)
    blocks = tiles * tiling.split if tiling.split > 1 else min(tiles, place.multiprocessors * tiling.resident)
    parts: Tensor | None = None
    arrived: Tensor | None = None
    if tiling.streamed:
        blocks = min(tiles * k_blocks, place.multiprocessors * tiling.resident)
        words = tiling.blocks * tiling.tokens // 2 * source.CONSUMERS
        parts = torch.empty(blocks, 2, words, dtype=torch.int32, device=out.device)
        arrived = torch.zeros(tiles, dtype=torch.int32, device=out.device)
    arguments = Arguments(
        *tensors,
        bias.data_ptr() if bias is not None else None,
        out.data_ptr(),
        tokens,
        tokens8,
        n,
        row_chunks * layout.ROWS,
        k_blocks,
        group_size // layout.K_BLOCK if grouped else k_blocks,
        tiling.split,
        k,
        parts.data_ptr() if parts is not None else None,
        arrived.data_ptr() if arrived is not None else None,
    )
    kernel = source.linear(tiling, grouped, out.dtype == torch.float16, grid, share)
    place.load(kernel)(blocks, tiling.split, (arguments,), place.stream, True)


def run(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, n: int, group_size: int, grid: Grid = Grid.PLAIN
) -> Tensor:
    """Quantize tokens and multiply; see ``ops.w4a8_linear``.

    One launch for few tokens, else two, on the current stream; no synchronization, and no memory but torch's own, so
    it may be captured in a graph.
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"this weight was prepared for bfloat16 or float16 activations, not {x.dtype}")
    if layout.padded(x.shape[-1]) != weight.shape[1] * layout.K_BLOCK:
        raise ValueError(f"{x.shape[-1]} inputs do not fit a weight of {weight.shape[1]} blocks of {layout.K_BLOCK}")
    out = x.new_empty(*x.shape[:-1], n)
    if out.numel() == 0:
        return out
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if rows.data_ptr() % 16:  # tokens are read 16 bytes at once
        rows = rows.clone()
    tokens, k = rows.shape
    bias = bias.to(x.dtype) if bias is not None else None
    with place_of(x) as place:
        grouped = has_sums_of_groups(group_size, grid)
        tiling = plan.choose(tokens, n, k, grouped, place.card, place.multiprocessors)
        rest = (weight, scales, bias, out.view(tokens, n), group_size, tiling, place, grid)
        if tiling.fused:
            multiply_floats(rows, *rest)
        else:
            codes, token_scales = quantize(rows, place, grid)
            multiply(codes, token_scales, *rest)
    return out


for _grid, _layout in LAYOUTS.items():
    ops.register_layout(_layout, partial(run, grid=_grid))
BACKENDS = tuple(Backend("cuda", name, refuse, prepare, grid) for grid, name in LAYOUTS.items())
