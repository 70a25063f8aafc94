"""Checks every kernel variant against float64 on fresh random data, with outputs poisoned before each run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qtoolkit.evals.gpu_bench.contenders import DTYPE, Weight, random_weight
from qtoolkit.kernels import chained, ops, reference, selection
from qtoolkit.kernels.selection import Backend, Grid, Problem

if TYPE_CHECKING:
    from qtoolkit.kernels.cuda.source import Tiling

# |out - want| / |want|: half a unit in the last place of bfloat16 is 2^-9 of a value, 2e-3; on average about half of it
BOUND = {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 1e-5}


def want(x: Tensor, weight: Weight, bias: Tensor | None, grid: Grid = Grid.PLAIN) -> Tensor:
    """Return the exact product in float64 of the tokens' int8 codes and the layer, with scales and bias."""
    codes, token_scales = reference.quantize_tokens(x)
    n, groups = weight.scales.shape
    whole = weight.codes if grid is not Grid.CHAINED else chained.values(weight.codes).double() / chained.STEP
    dense = (whole.double().view(n, groups, -1) * weight.scales.double()[:, :, None]).flatten(1)
    out = (codes.double() * token_scales.double()) @ dense.T
    return out if bias is None else out + bias.double()


def distance(out: Tensor, exact: Tensor) -> float:
    """Return |out - exact| / |exact|; NaN anywhere gives infinity."""
    found = ((out.double() - exact).norm() / exact.norm()).item()
    return found if found == found else float("inf")


def poison(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """Fill freed memory of an output's size with NaN; the allocator hands the same block to the next output."""
    torch.full(shape, torch.nan, dtype=dtype, device=device)


@dataclass(frozen=True)
class Case:
    """One check: what it is in words, whose kernels it runs, and the call that gives its outcome.

    The outcome has "refused" with a reason, or "error" (see ``distance``) and "right".
    """

    what: str
    of: str
    run: Callable[[], dict[str, object]]


OPERATORS = (
    (1, 4096, 4096), (3, 136, 264), (17, 1000, 520), (5, 200, 192), (15, 264, 2064),
    (65, 512, 1152), (100, 3072, 8192), (300, 640, 2048),
)  # fmt: skip
GROUPS_AND_DTYPES = ((-1, DTYPE), (-1, torch.float16), (128, DTYPE), (128, torch.float16), (64, DTYPE))
TILED = (768, 4096)  # n and k that wrap the rings
TILED_TOKENS = (5, 8, 13, 40, 64, 90, 128, 250, 1000)


def operators(names: tuple[str, ...], device: str, seed: int) -> Iterator[Case]:
    """Yield checks of the operator on each backend: odd sizes, groups, dtypes, with and without bias, twice."""
    for backend in selection.backends():
        if backend.name not in names:
            continue
        for tokens, n, k in OPERATORS if device == "cuda" else OPERATORS[1:4]:
            for group_size, dtype in GROUPS_AND_DTYPES:
                if k % group_size if group_size != -1 else backend.grid is Grid.FOLDED:  # groups are what folds
                    continue
                problem = Problem(k, n, group_size, dtype, device, backend.grid)
                kind = backend.name + ("" if backend.grid is Grid.PLAIN else f" {backend.grid}")
                what = f"check {kind} {str(dtype).removeprefix('torch.')} {tokens}x{n}x{k} group {group_size}"
                yield Case(what, backend.name, partial(operator, backend, problem, tokens, seed := seed + 1))


def operator(backend: Backend, problem: Problem, tokens: int, seed: int) -> dict[str, object]:
    """Run one layer twice and compare with float64 and with itself."""
    if reason := backend.refuse(problem):
        return {"refused": reason}
    n, k, dtype, device = problem.n, problem.k, problem.dtype, problem.device
    weight = random_weight(n, k, problem.group_size, device, seed, backend.grid is Grid.FOLDED)
    x = torch.randn(tokens, k, device=device).to(dtype)
    bias = torch.randn(n, device=device).to(dtype) if tokens % 2 else None
    own = backend.prepare(weight.packed(), weight.scales, problem)
    runs = []
    for _ in range(2):
        poison((tokens, n), dtype, device)
        runs.append(ops.w4a8_linear(x, *own, bias, n, problem.group_size, backend.layout).clone())
    error = distance(runs[0], want(x, weight, bias, backend.grid))
    same = torch.equal(*runs)
    return {"error": error, "same": same, "right": error < BOUND[dtype] and same}


def tilings(device: str, seed: int) -> Iterator[Case]:
    """Yield checks of every tiling that the Hopper kernel may be asked for, output poisoned."""
    for group_size in (-1, 128):
        for grid in Grid if group_size != -1 else (Grid.PLAIN, Grid.CHAINED):
            weight = random_weight(*TILED, group_size, device, seed := seed + 1, grid is Grid.FOLDED)
            for tokens in TILED_TOKENS:
                yield from tilings_of(weight, tokens, grid)


def tilings_of(weight: Weight, tokens: int, grid: Grid) -> Iterator[Case]:
    """Yield a check of each tiling of one layer and number of tokens."""
    from qtoolkit.kernels.cuda import backend, layout, plan

    n, k = weight.shape
    own = layout.prepare(weight.packed(), weight.scales, k, weight.group_size, grid)
    x = torch.randn(tokens, k, device=weight.codes.device).to(DTYPE)
    exact = want(x, weight, None, grid)
    kind = f"check cuda{'' if grid is Grid.PLAIN else f' {grid}'}{' g128' * (weight.group_size != -1)}"
    for tiling in plan.candidates(tokens, n, k, backend.has_sums_of_groups(weight.group_size, grid)):
        what = f"{kind} {tokens} tokens by {tiling}"
        yield Case(what, "cuda", partial(tiled, x, *own, weight.group_size, tiling, grid, exact))


def tiled(
    x: Tensor, own: Tensor, scales: Tensor, group_size: int, tiling: Tiling, grid: Grid, exact: Tensor
) -> dict[str, object]:
    """Run one tiling and compare with float64."""
    from qtoolkit.kernels.cuda import backend

    out = torch.full(exact.shape, torch.nan, dtype=x.dtype, device=x.device)
    with backend.place_of(x) as place:
        rest = (own, scales, None, out, group_size, tiling, place, grid)
        if tiling.fused:
            backend.multiply_floats(x, *rest)
        else:
            codes, token_scales = backend.quantize(x, place, grid)
            backend.multiply(codes, token_scales, *rest)
    error = distance(out, exact)
    return {"error": error, "right": error < BOUND[DTYPE]}
