"""Layers left in bfloat16, such as output layers: weights in panels, a product that streams them at memory's speed."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from qtoolkit.kernels import ops
from qtoolkit.kernels.cpu import library
from qtoolkit.kernels.cpu.backend import aligned

PANEL = 64  # output channels a panel
STEP = 2  # inputs a step; the layout is drawn in bfloat16.h
# The paths of this product that a code path of the W4A8 kernels allows, best first; the portable one allows none.
ALLOWED = {"amx": ("amx", "avx512", "avx2"), "avx512": ("avx512", "avx2"), "avxvnni": ("avx2",), "avx2": ("avx2",)}


@lru_cache(maxsize=1)
def paths() -> dict[str, int]:
    """Return the code paths that this CPU can run, best first, with the library's numbers for them.

    Raises:
        build.BuildError: there is no library here.
    """
    own = library.load()
    found = library.supported_paths(own.functions.qtk_bfloat16_path_name, own.functions.qtk_bfloat16_path_supported)
    return {name: number for name, number in found.items() if name in ALLOWED.get(own.path, ())}


def refuse(dtype: torch.dtype, device: str) -> str | None:
    """Return why this product does not run layers of ``dtype`` on ``device`` here, or None; may compile the library."""
    if device != "cpu":
        return "runs on CPUs only"
    if dtype != torch.bfloat16:
        return f"weights must be bfloat16, not {dtype}"
    if reason := library.failure():
        return reason
    return None if paths() else "needs AVX2 at least"


def prepare(weight: Tensor) -> Tensor:
    """Bring a weight, bfloat16 [n, k] on the CPU, into panels: bfloat16 [panels, ceil(k / 2), 128] on large pages.

    Raises:
        ValueError: it is another dtype or shape.
    """
    n, k, panels, steps = sizes(weight)
    own = aligned(panels * steps * PANEL * STEP * 2).view(torch.bfloat16).view(panels, steps, PANEL * STEP)
    weight = weight.contiguous()
    library.load().functions.qtk_bfloat16_pack(weight.data_ptr(), n, k, own.data_ptr())
    return own


def sizes(weight: Tensor) -> tuple[int, int, int, int]:
    """Return n, k, panels and steps of a weight, bfloat16 [n, k] on the CPU.

    Raises:
        ValueError: it is another dtype or shape.
    """
    if weight.dtype != torch.bfloat16 or weight.dim() != 2 or weight.device.type != "cpu":
        raise ValueError(f"the weight is {weight.dtype} {list(weight.shape)}, not bfloat16 [n, k] on the CPU")
    n, k = weight.shape
    return n, k, -(-n // PANEL), -(-k // STEP)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """Return ``x @ w.T + bias``, added in float32 and rounded once.

    Args:
        x: bfloat16 [..., k].
        weight: w [n, k] as ``prepare`` returned it.
        bias: bfloat16 [n] or None.
        n: output features.

    Returns:
        bfloat16 [..., n]; a token's result does not depend on the tokens beside it.

    Raises:
        ValueError: a shape or dtype is another.
    """
    return torch.ops.qtoolkit.bfloat16_linear(x, weight, bias, n)


def run(x: Tensor, weight: Tensor, bias: Tensor | None, n: int, path: str | None = None) -> Tensor:
    """Run the product; see ``linear``. ``path`` forces a code path (tests and benchmarks)."""
    k = inputs(x)
    if weight.dtype != torch.bfloat16 or weight.shape != (-(-n // PANEL), -(-k // STEP), PANEL * STEP):
        raise ValueError(f"weight {weight.dtype} {list(weight.shape)} is not that of {k} inputs and {n} outputs")
    return multiply(x, weight.data_ptr(), (None, None, None), bias, n, path)


def inputs(x: Tensor) -> int:
    """Return k of tokens, bfloat16 [..., k] on the CPU.

    Raises:
        ValueError: they are something else.
    """
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or not x.dim():
        raise ValueError(f"x must be bfloat16 [..., k] on the CPU, not {x.dtype} {list(x.shape)} on {x.device.type}")
    return x.shape[-1]


def multiply(
    x: Tensor,
    weight: int,
    compressed: tuple[int | None, int | None, int | None],
    bias: Tensor | None,
    n: int,
    path: str | None,
) -> Tensor:
    """Call the library with a weight's address, and those of its tables, starts and rest if it is compressed.

    Raises:
        ValueError: the bias does not fit; x and the weight's sizes are the caller's business.
    """
    if bias is not None:
        if bias.dtype != torch.bfloat16 or bias.shape != (n,):
            raise ValueError(f"bias must be bfloat16 [{n}], not {bias.dtype} {list(bias.shape)}")
        bias = bias.contiguous()
    k = x.shape[-1]
    rows = x.reshape(math.prod(x.shape[:-1]), k)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    y = torch.empty((*x.shape[:-1], n), dtype=torch.bfloat16)
    number = next(iter(paths().values())) if path is None else paths()[path]
    if library.load().functions.qtk_bfloat16_linear(
        number, rows.data_ptr(), rows.stride(0), rows.shape[0], k, n, weight, *compressed,
        None if bias is None else bias.data_ptr(), y.data_ptr(),
    ):  # fmt: skip
        raise MemoryError(f"no memory for {rows.shape[0]} tokens of {k} inputs")
    return y


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, n: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


ops.LIBRARY.define("bfloat16_linear(Tensor x, Tensor weight, Tensor? bias, SymInt n) -> Tensor")
ops.LIBRARY.impl("bfloat16_linear", run, "CompositeExplicitAutograd")
torch.library.register_fake("qtoolkit::bfloat16_linear", _fake, lib=ops.LIBRARY)
