"""The Triton backend: refuses what the kernels cannot do, prepares weights, and launches quantizer and product."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from qtoolkit.kernels import ops, reference, tables
from qtoolkit.kernels.selection import Backend, Grid, Problem
from qtoolkit.kernels.triton import layout

LAYOUTS = {Grid.PLAIN: "halves", Grid.CHAINED: "halves chained", Grid.FOLDED: "halves folded"}
CAPABILITY = (8, 0)  # the oldest: Ampere
MULTIPROCESSORS = 108  # A100; only the split of the inputs depends on it
COLUMNS = ("tokens", "rows", "split", "warps", "stages", "fused")
FUSED_TOKENS = 16  # a tile of tokens that quantizes for itself holds all of them
FUSED_FLOATS = 32768  # each program reads all tokens' floats once more: 64 KB from L2, about as long as a launch
BUCKETS = (1, 16, 32, 64, 128, 256, 512, 1024, 4096)


@dataclass(frozen=True)
class Tiling:
    """How a product is cut: tokens x rows of a tile, shares of the inputs, warps and pipeline stages of a program.

    With ``fused`` each program quantizes its tokens itself, and there is no launch for that.
    """

    tokens: int
    rows: int
    split: int
    warps: int
    stages: int
    fused: bool = False


def refuse_tiling(cut: Tiling, n: int, k: int, grouped: bool) -> str | None:
    """Return why the kernels cannot run a size so, or None."""
    widths, rows = (16, 32, 64, 128), (64, 128)
    if cut.tokens not in widths or cut.rows not in rows or cut.warps not in (4, 8) or not 2 <= cut.stages <= 6:
        return f"there is no such tile: {cut}"
    if grouped and cut.tokens == 128 and cut.rows == 128:
        return "the sums of a group and of all groups for 128 tokens and 128 rows do not fit into the registers"
    if cut.fused and (cut.tokens > FUSED_TOKENS or k % 16):
        return f"a program quantizes at most {FUSED_TOKENS} tokens of 16 inputs and multiples, not {cut.tokens} of {k}"
    if not 1 <= cut.split <= layout.padded(k) // layout.BLOCK:
        return f"{cut.split} programs cannot share {layout.padded(k) // layout.BLOCK} blocks of inputs"
    return None


def bucket(tokens: int) -> int:
    """Return the measured number of tokens that stands for ``tokens``: the next one up, or the largest."""
    return next((b for b in BUCKETS if tokens <= b), BUCKETS[-1])


@lru_cache(maxsize=8)
def table(card: str, architecture: str) -> tables.Rows:
    """Return the measured tilings of ``card``; empty without a table."""

    def refuse_row(point: tables.Point, row: tuple[int, ...]) -> str | None:
        return refuse_tiling(tiling_of(row), point.n, point.k, point.grouped)

    return tables.find("triton", card, architecture, COLUMNS, refuse_row)


def tiling_of(row: tuple[int, ...]) -> Tiling:
    """Return a table's row as a tiling; see ``COLUMNS``."""
    tokens, rows, split, warps, stages, fused = row
    return Tiling(tokens, rows, split, warps, stages, bool(fused))


def choose(tokens: int, n: int, k: int, grouped: bool, device: torch.device) -> Tiling:
    """Return the tiling measured on this card, or an estimate."""
    card = torch.cuda.get_device_properties(device) if device.type == "cuda" else None  # else the interpreter
    rows = table(card.name, f"sm_{card.major}{card.minor}") if card else {}
    measured = rows.get(tables.Point(bucket(tokens), n, k, grouped))
    cut = tiling_of(measured) if measured else tiling(tokens, n, k, grouped)
    return cut if tokens <= cut.tokens else replace(cut, fused=False)


def tiling(tokens: int, n: int, k: int, grouped: bool) -> Tiling:
    """Estimate tiles that fill a card of about 100 multiprocessors and keep products in their registers."""
    width = 16
    while width < min(tokens, 128):
        width *= 2
    rows = 64 if width == 128 and grouped else 128
    tiles = layout.padded(n) // rows * -(-tokens // width)
    split = 1
    while split < 8 and 2 * tiles * split <= 2 * MULTIPROCESSORS and layout.padded(k) // layout.BLOCK >= 8 * split:
        split *= 2
    fused = tokens <= FUSED_TOKENS and tokens * k <= FUSED_FLOATS and k % 16 == 0  # else registers are spilled
    return Tiling(width, rows, split, 8 if width >= 64 and rows == 128 else 4, 4 if width <= 64 else 3, fused)


def refuse(problem: Problem) -> str | None:
    """Return why these kernels cannot run ``problem`` here, or None."""
    if problem.device != "cuda":
        return "needs a CUDA device"
    if problem.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"activations must be floating point, not {problem.dtype}"
    size = problem.group_size
    if size != -1 and size != layout.BLOCK // 2 and size % layout.BLOCK:
        return f"groups must be 64 or whole blocks of {layout.BLOCK} inputs, not {size}"
    if problem.grid is Grid.FOLDED and size == -1:
        return "only groups fold"
    if problem.grid is Grid.CHAINED and (size == layout.BLOCK // 2 or problem.k % 8):
        return f"the chained grid wants words of 8 inputs and groups of {layout.BLOCK} or more"
    if size != -1 and problem.k % size:
        return f"{problem.k} inputs are no whole number of groups of {size}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    if torch.cuda.get_device_capability() < CAPABILITY:
        return f"needs compute capability 8.0 or newer, not {torch.cuda.get_device_capability()}"
    return None


def has_sums_of_groups(group_size: int, grid: Grid) -> bool:
    """Return whether a product scales each group's sum by itself, in float32; folded ones have one sum a row."""
    return group_size != -1 and grid is not Grid.FOLDED


def prepare(packed: Tensor, scales: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Permute a checkpoint's weight into halves, on the device it lies on."""
    return layout.prepare(packed, scales, problem.k, problem.group_size, problem.grid)


def quantize(x: Tensor, grid: Grid = Grid.PLAIN) -> tuple[Tensor, Tensor]:
    """Quantize x [tokens, k]; return codes int8 [tokens, k padded], zeros behind k, and scales fp32 [tokens]."""
    from qtoolkit.kernels.triton import kernels

    tokens, k = x.shape
    codes = torch.empty(tokens, layout.padded(k), dtype=torch.int8, device=x.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
    kernels.quantize_tokens[(tokens,)](
        x,
        codes,
        scales,
        k,
        codes.shape[1],
        BLOCK=1024,
        CHAINED=grid is Grid.CHAINED,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return codes, scales


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize x [..., k] as ``reference.quantize_tokens`` does, in one launch."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if rows.numel() == 0 or (x.is_cuda and torch.cuda.get_device_capability(x.device) < CAPABILITY):
        return reference.quantize_tokens(x)
    with torch.cuda.device_of(x):
        codes, scales = quantize(rows)
    return codes[:, : x.shape[-1]].reshape(x.shape), scales.reshape(*x.shape[:-1], 1)


def multiply(
    codes: Tensor,
    token_scales: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out: Tensor,
    group_size: int,
    cut: Tiling,
    grid: Grid = Grid.PLAIN,
) -> None:
    """Launch the product of tokens with a prepared weight into out [tokens, n].

    ``codes`` and ``token_scales`` are what ``quantize`` gives; where ``cut`` is fused they are the floats [tokens, k]
    and memory that scales may be written to.
    """
    from qtoolkit.kernels.triton import kernels

    tokens, n = out.shape
    n_padded, k_padded, k = weight.shape[0], 2 * weight.shape[1], codes.shape[1]
    grouped = has_sums_of_groups(group_size, grid)
    shares = torch.float32 if grouped else torch.int32
    parts = torch.empty(cut.split, tokens, n, dtype=shares, device=out.device) if cut.split > 1 else out
    some_bias = bias if bias is not None else out  # a pointer that is not read
    programs = (n_padded // cut.rows * -(-tokens // cut.tokens), cut.split)
    kernels.linear[programs](
        weight, scales, codes, token_scales, some_bias, out, parts, tokens, n, n_padded, k_padded, k, group_size,
        TOKENS=cut.tokens, ROWS=cut.rows, SPLIT=cut.split, GROUPED=grouped, HALF_GROUPS=group_size == 64,
        BIAS=bias is not None, ASM=os.environ.get("TRITON_INTERPRET") != "1", CHAINED=grid is Grid.CHAINED,
        FOLDED=grid is Grid.FOLDED, FUSED=cut.fused,
        num_warps=cut.warps, num_stages=cut.stages, enable_fp_fusion=not cut.fused,
    )  # fmt: skip
    if cut.split > 1:
        kernels.add_shares[(tokens, -(-n // 1024))](
            parts, scales, token_scales, some_bias, out, tokens, n,
            SPLIT=cut.split, GROUPED=grouped, BIAS=bias is not None, BLOCK=1024, num_warps=4,
        )  # fmt: skip


def run(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, n: int, group_size: int, grid: Grid = Grid.PLAIN
) -> Tensor:
    """Quantize tokens and multiply; see ``ops.w4a8_linear``.

    Launches on the current stream; no synchronization, and no memory but torch's own, so it may be captured in a graph.
    """
    if layout.padded(x.shape[-1]) != 2 * weight.shape[1]:
        raise ValueError(f"{x.shape[-1]} inputs do not fit a weight of {2 * weight.shape[1]}")
    out = x.new_empty(*x.shape[:-1], n)
    if out.numel() == 0:
        return out
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    tokens, k = rows.shape
    with torch.cuda.device_of(x):  # Triton launches on the current device; a tensor of the CPU changes nothing
        cut = choose(tokens, n, k, has_sums_of_groups(group_size, grid), x.device)
        if cut.fused:
            codes, token_scales = rows, torch.empty(tokens, dtype=torch.float32, device=x.device)
        else:
            codes, token_scales = quantize(rows, grid)
        multiply(codes, token_scales, weight, scales, bias, out.view(tokens, n), group_size, cut, grid)
    return out


for _grid, _layout in LAYOUTS.items():
    ops.register_layout(_layout, partial(run, grid=_grid))
if importlib.util.find_spec("triton") is not None:
    ops.LIBRARY.impl("quantize_tokens", quantize_tokens, "CUDA")
BACKENDS = tuple(Backend("triton", name, refuse, prepare, grid) for grid, name in LAYOUTS.items())
