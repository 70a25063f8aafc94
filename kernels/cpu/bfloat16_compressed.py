"""Layers left in bfloat16 with 12 bits a weight in memory, exactly: few upper bytes occur, so four bits name them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtoolkit.kernels import ops
from qtoolkit.kernels.cpu import bfloat16, library
from qtoolkit.kernels.cpu.backend import aligned

STEP_BYTES, ENTRIES = 192, 16  # of a step of 64 channels and 2 inputs, of a panel's table; see bfloat16.h
# More values than this share that no table names cost more time than the bytes save (measured, AVX512).
MOST_REST = 2**-10


@dataclass(frozen=True)
class Compressed:
    """A weight [n, k] of bfloat16 values, restored bit for bit as it is multiplied; the layout is drawn in bfloat16.h.

    ``weight``: uint8 [panels, ceil(k / 2), 192]; ``tables``: uint8 [panels, 16]; ``starts``: int64 [panels + 1];
    ``rest``: int64 [starts[-1]].
    """

    weight: Tensor
    tables: Tensor
    starts: Tensor
    rest: Tensor


def compress(weight: Tensor, most_rest: float = MOST_REST) -> Compressed | None:
    """Compress a weight, bfloat16 [n, k] on the CPU; None where more than ``most_rest`` of its values fit no table.

    Raises:
        ValueError: it is another dtype or shape.
        MemoryError: there is no memory for a panel.
    """
    n, k, panels, steps = bfloat16.sizes(weight)
    weight = weight.contiguous()
    functions = library.load().functions
    tables, counts = torch.empty(panels, ENTRIES, dtype=torch.uint8), torch.empty(panels, dtype=torch.int64)
    if functions.qtk_bfloat16_survey(weight.data_ptr(), n, k, tables.data_ptr(), counts.data_ptr()):
        raise MemoryError(f"no memory for a panel of {k} inputs")
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    if starts[-1] > most_rest * weight.numel():
        return None
    own = aligned(panels * steps * STEP_BYTES).view(panels, steps, STEP_BYTES)
    rest = torch.empty(int(starts[-1]), dtype=torch.int64)
    if functions.qtk_bfloat16_compress(
        weight.data_ptr(), n, k, tables.data_ptr(), starts.data_ptr(), own.data_ptr(), rest.data_ptr()
    ):
        raise MemoryError(f"no memory for a panel of {k} inputs")
    return Compressed(own, tables, starts, rest)


def linear(x: Tensor, weight: Compressed, bias: Tensor | None, n: int) -> Tensor:
    """Return what ``bfloat16.linear`` does, bit for bit, on a compressed weight."""
    return torch.ops.qtoolkit.bfloat16_linear_compressed(
        x, weight.weight, weight.tables, weight.starts, weight.rest, bias, n
    )


def run(
    x: Tensor,
    weight: Tensor,
    tables: Tensor,
    starts: Tensor,
    rest: Tensor,
    bias: Tensor | None,
    n: int,
    path: str | None = None,
) -> Tensor:
    """Run the product; the tensors are those of ``Compressed``. ``path`` forces a code path (tests and benchmarks).

    Raises:
        ValueError: a shape or dtype is another.
    """
    panels, steps = -(-n // bfloat16.PANEL), -(-bfloat16.inputs(x) // bfloat16.STEP)
    _demand("weight", weight, torch.uint8, panels, steps, STEP_BYTES)
    _demand("tables", tables, torch.uint8, panels, ENTRIES)
    _demand("starts", starts, torch.int64, panels + 1)
    _demand("rest", rest, torch.int64, int(starts[-1]))
    return bfloat16.multiply(
        x, weight.data_ptr(), (tables.data_ptr(), starts.data_ptr(), rest.data_ptr()), bias, n, path
    )


def _demand(name: str, part: Tensor, dtype: torch.dtype, *shape: int) -> None:
    if part.dtype != dtype or part.shape != shape or not part.is_contiguous():
        raise ValueError(f"{name} is {part.dtype} {list(part.shape)}, not {dtype} {list(shape)}")


def _fake(
    x: Tensor, weight: Tensor, tables: Tensor, starts: Tensor, rest: Tensor, bias: Tensor | None, n: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


ops.LIBRARY.define(
    "bfloat16_linear_compressed(Tensor x, Tensor weight, Tensor tables, Tensor starts, Tensor rest, Tensor? bias, "
    "SymInt n) -> Tensor"
)
ops.LIBRARY.impl("bfloat16_linear_compressed", run, "CompositeExplicitAutograd")
torch.library.register_fake("qtoolkit::bfloat16_linear_compressed", _fake, lib=ops.LIBRARY)
