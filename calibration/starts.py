"""Compensation from several starts, the best of which each row keeps.

GPTQ is greedy, and where it ends depends on the order of the columns and on the scales it begins with; coordinate
descent then only finds the nearest minimum. With a few orders and scales a row's least error lies 2 to 7 % lower. Rows
of all scales go through one sweep together, which costs little more than one of them while a layer is small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qtoolkit.calibration.folded import stored
from qtoolkit.calibration.refine import errors, refined
from qtoolkit.scheme import Scheme
from qtoolkit.stages import QuantizedWeight
from qtoolkit.sweeps import Packed

STRETCHES = (1.0, 0.95, 1.05, 0.9)  # of the scales to begin with
SPREAD = 0.5  # standard deviation of the logarithm by which an order's keys are jittered
WORK = 1 << 33  # multiply-adds of all sweeps over a layer: a layer too large for several starts has one


def count(n: int, k: int, orders: int) -> tuple[int, int]:
    """Return how many orders and how many scales a layer of n outputs and k inputs is rounded with."""
    sweeps = affordable(n, k)
    orders = min(orders, sweeps)
    return orders, 1 if orders == 1 else min(len(STRETCHES), sweeps // orders)


def affordable(n: int, k: int) -> int:
    """Return how many sweeps over a layer of n outputs and k inputs ``WORK`` allows, at least one."""
    return max(1, WORK // (n * k * k))


def orders(diagonal: Tensor, wanted: int) -> list[Tensor]:
    """Return ``wanted`` orders of the inputs: by falling ``diagonal`` [k] of the Hessian, jittered at random."""
    draw = torch.Generator("cpu").manual_seed(0)
    found = []
    for _ in range(wanted):
        noise = torch.randn(len(diagonal), generator=draw, device="cpu").to(diagonal) * SPREAD
        found.append(torch.argsort(diagonal * noise.exp(), descending=True, stable=True))
    return found


def best(
    weight: Tensor,
    scales: Tensor,
    *,
    matrix: Tensor,
    scheme: Scheme,
    rounds: int,
    sweeps: Sequence[Callable[[Tensor, Tensor], Tensor]],
    stretches: int,
    fold: bool = False,
    refit: bool = False,
    packed: Packed | None = None,
) -> QuantizedWeight:
    """Return for every row the codes and scales of the start that leaves the least error under ``matrix``.

    Args:
        weight: float32 [n, k].
        scales: [n, groups] to begin with, in the dtype they are stored in.
        matrix: float32 [k, k], the damped Hessian, or ``products.halved``.
        scheme: gives the code range.
        rounds: of refinement after each start.
        sweeps: one for every order: takes weight and scales, returns int8 codes.
        stretches: how many of ``STRETCHES`` are tried.
        fold: scales are to be multiples of one base a row, see ``folded``.
        refit: whether refinement changes scales, too.
        packed: the matrix for whole sweeps of refinement, where they run.
    """
    n = len(weight)
    tried = STRETCHES[:stretches]
    begun = stored(torch.cat([scales.float() * stretch for stretch in tried]), scales.dtype, fold)
    copies = weight.repeat(len(tried), 1)
    found: list[QuantizedWeight] = []
    lost: list[Tensor] = []  # of every start, [n]
    for sweep in sweeps:
        made = QuantizedWeight(sweep(copies, begun), begun)
        made = refined(copies, matrix, made, scheme, rounds, fold, refit, packed) if rounds else made
        if len(made.codes) == n and len(sweeps) == 1:
            return made
        lost += errors(copies, matrix, made, packed).split(n)
        found += [QuantizedWeight(c, s) for c, s in zip(made.codes.split(n), made.scales.split(n), strict=True)]
    least = torch.stack(lost).argmin(dim=0)
    rows = torch.arange(n, device=weight.device)
    return QuantizedWeight(
        torch.stack([each.codes for each in found])[least, rows],
        torch.stack([each.scales for each in found])[least, rows],
    )
