"""Checks every kernel variant against float64 on fresh random data, with outputs poisoned before each run."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qtoolkit.evals.gpu_bench.contenders import DTYPE, Weight, random_weight
from qtoolkit.kernels import chained, ops, reference, selection
from qtoolkit.kernels.selection import Problem

# |out - want| / |want|: half a unit in the last place of bfloat16 is 2^-9 of a value, 2e-3; on average about half of it
BOUND = {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 1e-5}


def want(x: Tensor, weight: Weight, bias: Tensor | None, is_chained: bool = False) -> Tensor:
    """Return the exact product in float64 of the tokens' int8 codes and the layer, with scales and bias."""
    codes, token_scales = reference.quantize_tokens(x)
    n, groups = weight.scales.shape
    units = chained.values(weight.codes).double() / chained.STEP if is_chained else weight.codes.double()
    dense = (units.view(n, groups, -1) * weight.scales.double()[:, :, None]).flatten(1)
    out = (codes.double() * token_scales.double()) @ dense.T
    return out if bias is None else out + bias.double()


def distance(out: Tensor, exact: Tensor) -> float:
    """Return |out - exact| / |exact|; NaN anywhere gives infinity."""
    found = ((out.double() - exact).norm() / exact.norm()).item()
    return found if found == found else float("inf")


def poison(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """Fill freed memory of an output's size with NaN; the allocator hands the same block to the next output."""
    torch.full(shape, torch.nan, dtype=dtype, device=device)


def operators(names: tuple[str, ...], device: str, seed: int) -> Iterator[dict[str, object]]:
    """Check the operator on each backend: odd sizes, groups, dtypes, with and without bias, twice for equal bits."""
    shapes = [(1, 4096, 4096), (3, 136, 264), (17, 1000, 520), (65, 512, 1152), (100, 3072, 8192), (300, 640, 2048)]
    for backend in selection.backends():
        if backend.name not in names:
            continue
        for tokens, n, k in shapes if device == "cuda" else shapes[1:3]:
            for group_size, dtype in [(-1, DTYPE), (-1, torch.float16), (128, DTYPE), (64, DTYPE)]:
                if group_size != -1 and k % group_size:
                    continue
                problem = Problem(k, n, group_size, dtype, device, backend.chained)
                case = {
                    "backend": backend.name,
                    "chained": backend.chained,
                    "tokens": tokens,
                    "n": n,
                    "k": k,
                    "group_size": group_size,
                }
                case |= {"dtype": str(dtype).removeprefix("torch.")}
                if reason := backend.refuse(problem):
                    yield case | {"refused": reason}
                    continue
                weight = random_weight(n, k, group_size, device, seed := seed + 1)
                x = torch.randn(tokens, k, device=device).to(dtype)
                bias = torch.randn(n, device=device).to(dtype) if tokens % 2 else None
                own = backend.prepare(weight.packed(), weight.scales, problem)
                runs = []
                for _ in range(2):
                    poison((tokens, n), dtype, device)
                    runs.append(ops.w4a8_linear(x, *own, bias, n, group_size, backend.layout).clone())
                error = distance(runs[0], want(x, weight, bias, backend.chained))
                same = torch.equal(*runs)
                yield case | {"error": error, "same": same, "right": error < BOUND[dtype] and same}


def tilings(device: str, seed: int) -> Iterator[dict[str, object]]:
    """Check every tiling that the Hopper kernel may be asked for, on a size that wraps its rings, output poisoned."""
    for grouped in (False, True):
        for is_chained in (False, True):
            seed += 1
            weight = random_weight(768, 4096, 128 if grouped else -1, device, seed)
            for tokens in (5, 8, 13, 40, 64, 90, 128, 250, 1000):
                yield from _tilings_of(weight, tokens, is_chained)


def _tilings_of(weight: Weight, tokens: int, is_chained: bool) -> Iterator[dict[str, object]]:
    from qtoolkit.kernels.cuda import backend, layout, plan

    n, k = weight.shape
    grouped, device = weight.group_size != -1, weight.codes.device
    own = layout.to_fragments(weight.codes, layout.CHAINED if is_chained else layout.PLAIN)
    scales = layout.to_kernel_scales(weight.scales, weight.group_size)
    x = torch.randn(tokens, k, device=device).to(DTYPE)
    exact = want(x, weight, None, is_chained)
    for tiling in plan.candidates(tokens, n, k, grouped):
        out = torch.full((tokens, n), torch.nan, dtype=DTYPE, device=device)
        with backend.place_of(x) as place:
            rest = (own, scales, None, out, weight.group_size, tiling, place, is_chained)
            if tiling.fused:
                backend.multiply_floats(x, *rest)
            else:
                codes, token_scales = backend.quantize(x, place, is_chained)
                backend.multiply(codes, token_scales, *rest)
        error = distance(out, exact)
        case = {"tiling": str(tiling), "tokens": tokens, "grouped": grouped, "chained": is_chained}
        yield case | {"error": error, "right": error < BOUND[DTYPE]}
