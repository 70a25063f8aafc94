"""The CPU backend: refuses what the C++ kernels cannot do, packs weights into panels, and calls the library."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from qtoolkit.kernels import folded, ops
from qtoolkit.kernels.cpu import library
from qtoolkit.kernels.selection import Backend, Grid, Problem

LAYOUT = "cpu-panel64"  # drawn in job.h
LAYOUT_FOLDED = "cpu-panel64 folded"  # the same weight; scales are bases and multiples in one tensor
PANEL = 64  # output channels a panel
BASE_ROWS = 4  # rows of 64 bytes that a panel's float32 bases take
STEP = 4  # inputs a step
LARGE_PAGE = 1 << 21
OPERATOR = "w4a8_linear_cpu"  # what ops.w4a8_linear calls for this layout: without Python in between, where torch can
GATED = "w4a8_gated_linear_cpu"  # the same for activations that come as gate and up
MOST_SUMMED = 131072  # inputs under one integer sum: 16 * 8 * 127 * inputs must fit int32 (sums of bytes may wrap)


def refuse(problem: Problem) -> str | None:
    """Return why these kernels cannot run ``problem`` here, or None; the first call may compile the library."""
    if problem.device != "cpu":
        return "runs on CPUs only"
    if problem.dtype not in library.DTYPES:
        return f"activations must be bfloat16, float16 or float32, not {problem.dtype}"
    if problem.group_size != -1 and (problem.group_size < STEP or problem.group_size % STEP):
        return f"groups must be a positive multiple of {STEP} inputs, not {problem.group_size}"
    whole = problem.group_size == -1 or problem.grid is Grid.FOLDED
    summed = problem.k if whole else min(problem.k, problem.group_size)
    if summed > MOST_SUMMED:
        return f"{summed} inputs share a scale; the integer sums hold {MOST_SUMMED}"
    return library.failure()


def prepare(packed: Tensor, scales: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Bring a checkpoint's weight into panels.

    Args:
        packed: int32 [n, ceil(k / 8)], low nibble first, stored with +8.
        scales: float [n, groups].
        problem: the layer.

    Returns:
        weight uint8 [panels, ceil(k / 4), 128] on a 2 MB boundary, and scales [panels, groups, 64], bfloat16 where
        that holds every scale exactly (half the bytes to stream), else float32.

    Raises:
        ValueError: a shape or dtype is not what ``problem`` says.
    """
    weight = _panels(packed, scales, problem)
    own = _by_panel(scales.float())
    half = own.bfloat16()
    return weight, half if torch.equal(half.float(), own) else own


def prepare_folded(packed: Tensor, scales: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Bring a checkpoint's weight whose scales fold (``folded.split``) into panels; arguments as in ``prepare``.

    Returns:
        weight as from ``prepare``, and scales uint8 [panels, 4 + groups, 64]: a panel's float32 bases, 256 bytes,
        then the multiples of each group, int8.

    Raises:
        ValueError: a shape or dtype is not what ``problem`` says, or the scales do not fold.
    """
    weight = _panels(packed, scales, problem)
    parts = folded.split(scales)
    if parts is None:
        raise ValueError("these scales are no small multiples of one scale a channel")
    multiples, base = parts
    bases = _by_panel(base[:, None]).view(torch.uint8).view(-1, BASE_ROWS, PANEL)
    return weight, torch.cat([bases, _by_panel(multiples).view(torch.uint8)], dim=1)


def _panels(packed: Tensor, scales: Tensor, problem: Problem) -> Tensor:
    k, n = problem.k, problem.n
    steps, panels = -(-k // STEP), -(-n // PANEL)
    groups = 1 if problem.group_size == -1 else -(-k // problem.group_size)
    if packed.dtype != torch.int32 or packed.shape != (n, -(-k // 8)):
        raise ValueError(f"packed weight is {packed.dtype} {list(packed.shape)}, not int32 {[n, -(-k // 8)]}")
    if scales.shape != (n, groups):
        raise ValueError(f"scales are {list(scales.shape)}, not {[n, groups]}")
    functions = library.load().functions
    library.register_operators(OPERATOR, GATED)
    weight = aligned(panels * steps * STEP * PANEL // 2).view(panels, steps, STEP * PANEL // 2)
    packed = packed.contiguous()
    functions.qtk_pack(packed.data_ptr(), packed.shape[1], n, k, weight.data_ptr())
    return weight


def _by_panel(values: Tensor) -> Tensor:
    """Return values [n, groups] as [panels, groups, 64], channels that are not there with 0."""
    n, groups = values.shape
    panels = -(-n // PANEL)
    own = torch.zeros(panels * PANEL, groups, dtype=values.dtype)
    own[:n] = values
    return own.view(panels, PANEL, groups).transpose(1, 2).contiguous()


def aligned(size: int) -> Tensor:
    """Return uint8 [size] on large pages, from a 2 MB boundary on; memory that is not touched stays unused."""
    whole = torch.empty(size + LARGE_PAGE, dtype=torch.uint8)
    start = -whole.data_ptr() % LARGE_PAGE
    own = whole[start : start + size]
    library.load().functions.qtk_advise(own.data_ptr(), size)
    return own


def run(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    n: int,
    group_size: int,
    path: str | None = None,
    gated: bool = False,
) -> Tensor:
    """Run the product; see ``ops.w4a8_linear``. ``path`` forces a code path (tests and benchmarks).

    ``gated``: x is [gate, up], [..., 2 k], and ``reference.silu_and_mul`` of it the activation.
    """
    own = library.load()
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype)
    path_id = own.path_id if path is None else own.paths[path]
    if own.functions.qtk_linear(*_arguments(path_id, rows, weight, scales, bias, n, group_size, gated, y)):
        raise MemoryError(f"no memory for the codes of {rows.shape[0]} tokens of {rows.shape[1]} inputs")
    return y


class Linear(ctypes.Structure):
    """The struct ``Linear`` of driver.cpp: what ``qtk_linear_again`` is called with."""

    _fields_ = [
        ("path", ctypes.c_int), ("x", ctypes.c_void_p), ("x_stride", ctypes.c_int64), ("dtype", ctypes.c_int),
        ("gated", ctypes.c_int), *((name, ctypes.c_int64) for name in ("m", "k", "n", "group_size")),
        ("weight", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("scale_dtype", ctypes.c_int),
        ("bias", ctypes.c_void_p), ("bias_dtype", ctypes.c_int), ("y", ctypes.c_void_p),
    ]  # fmt: skip


def described(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, n: int, group_size: int, gated: bool, y: Tensor
) -> Linear:
    """Return a call of the operator that can be repeated; x [tokens, k] and bias are dense, y [tokens, n] its result.

    Raises:
        ValueError: a shape or dtype is not as said.
    """
    if x.dim() != 2 or not x.is_contiguous() or (bias is not None and not bias.is_contiguous()):
        raise ValueError(f"activations {list(x.shape)} with strides {x.stride()} or the bias are not dense")
    if y.shape != (x.shape[0], n) or y.dtype != x.dtype or not y.is_contiguous():
        raise ValueError(f"the result is {y.dtype} {list(y.shape)}, not {x.dtype} {[x.shape[0], n]}")
    return Linear(*_arguments(library.load().path_id, x, weight, scales, bias, n, group_size, gated, y))


def _arguments(
    path: int,
    rows: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    n: int,
    group_size: int,
    gated: bool,
    y: Tensor,
) -> tuple[int | None, ...]:
    """Return what ``qtk_linear`` takes."""
    width = rows.shape[1]
    k = width // 2 if gated else width
    if k < 1:
        raise ValueError("a layer needs inputs, and x has none")
    if gated and width % 2:
        raise ValueError(f"gate and up must have the same size; together they have {width}")
    dtype, scale_dtype = library.DTYPES.get(rows.dtype), library.SCALES.get(scales.dtype)
    panels, groups = -(-n // PANEL), 1 if group_size == -1 else -(-k // max(group_size, STEP))
    whole = group_size == -1 or (group_size >= STEP and group_size % STEP == 0)
    scale_rows = groups + (BASE_ROWS if scale_dtype == library.UINT8 else 0)
    if not whole or weight.shape != (panels, -(-k // STEP), 128) or scales.shape != (panels, scale_rows, PANEL):
        raise ValueError(
            f"weight {list(weight.shape)} and scales {list(scales.shape)} are not those of {k} inputs, {n} outputs "
            f"and groups of {group_size}"
        )
    if dtype is None or scale_dtype is None or rows.device.type != "cpu":
        raise ValueError(f"activations {rows.dtype} on {rows.device.type} or scales {scales.dtype} are not supported")
    if bias is not None and (bias.shape != (n,) or bias.dtype not in library.DTYPES):
        raise ValueError(f"bias is {bias.dtype} {list(bias.shape)}, not [{n}] floating point")
    return (
        path, rows.data_ptr(), rows.stride(0), dtype, int(gated), rows.shape[0], k, n, group_size,
        weight.data_ptr(), scales.data_ptr(), scale_dtype,
        None if bias is None else bias.data_ptr(), 0 if bias is None else library.DTYPES[bias.dtype], y.data_ptr(),
    )  # fmt: skip


def _fake(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, n: int, group_size: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


def _run_gated(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, n: int, group_size: int) -> Tensor:
    return run(x, weight, scales, bias, n, group_size, gated=True)


for name, function in ((OPERATOR, run), (GATED, _run_gated)):
    ops.LIBRARY.define(
        f"{name}(Tensor x, Tensor weight, Tensor scales, Tensor? bias, SymInt n, int group_size) -> Tensor"
    )
    # The library's own, registered for CPU, stands before it.
    ops.LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qtoolkit::{name}", _fake, lib=ops.LIBRARY)
for layout in (LAYOUT, LAYOUT_FOLDED):
    ops.register_layout(
        layout, run, torch.ops.qtoolkit.w4a8_linear_cpu.default, torch.ops.qtoolkit.w4a8_gated_linear_cpu.default
    )
BACKENDS = (
    Backend("cpu", LAYOUT, refuse, prepare),
    Backend("cpu", LAYOUT_FOLDED, refuse, prepare_folded, Grid.FOLDED),
)
