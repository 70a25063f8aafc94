"""Times every tiling of the Hopper kernels at every point and writes the card's table; see ``kernels/tuning``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import astuple
from functools import partial
from pathlib import Path

import torch

from qtoolkit.evals.gpu_bench.clock import summary
from qtoolkit.evals.gpu_bench.contenders import DTYPE, random_weight
from qtoolkit.evals.gpu_bench.session import Run
from qtoolkit.evals.gpu_bench.steps import environment, sizes
from qtoolkit.kernels import tables
from qtoolkit.kernels.cuda import backend, layout, plan
from qtoolkit.kernels.cuda.source import Tiling
from qtoolkit.kernels.selection import Problem

SHARE = 0.4  # of the remaining time, at most


def row_of(tiling: Tiling) -> tuple[int, ...]:
    """Return a tiling as a table's row; see ``plan.COLUMNS``."""
    return tuple(int(value) for value in astuple(tiling))


def tune(run: Run, shapes: Sequence[str], tokens: Sequence[int], folder: Path) -> Path:
    """Time quantization and product with every tiling; write the best to ``folder`` after each shape; return the file.

    Shapes that the time does not allow are left to the estimate, and noted.

    Raises:
        RuntimeError: this card runs other kernels, which nothing tunes yet.
    """
    n, k = sizes(shapes[0])
    if reason := backend.refuse(Problem(k, n, -1, DTYPE, run.device)):
        raise RuntimeError(reason)
    card = torch.cuda.get_device_name()
    path = folder / f"cuda-{tables.name_of(card)}.json"
    until = time.monotonic() + SHARE * (run.until - time.monotonic())
    rows: dict[tables.Point, tuple[int, ...]] = {}
    margins: list[float] = []
    for shape in shapes:
        n, k = sizes(shape)
        for group_size in (-1, 128):
            if time.monotonic() > until:
                run.could_not.append(f"tuning {shape} group {group_size}: out of time")
                continue
            weight = random_weight(n, k, group_size, run.device)
            own, scales = layout.to_fragments(weight.codes), layout.to_kernel_scales(weight.scales, group_size)
            for m in tokens:
                times = measure(run, own, scales, m, n, k, group_size)
                with backend.place_of(own) as place:
                    estimate = plan.estimate(m, n, k, group_size != -1, place.multiprocessors)
                if not times:
                    continue
                best = min(times, key=times.__getitem__)
                if estimate in times:
                    margins.append(times[estimate] / times[best])
                rows[tables.Point(plan.bucket(m), n, k, group_size != -1)] = row_of(best)
        if rows:
            tables.write(path, "cuda", card, environment(run.device), plan.COLUMNS, rows)
    if margins:
        loss = sum(margins) / len(margins)
        run.result["tuning"] = {"points": len(rows), "estimate_over_best": round(loss, 4)}
        print(f"tuned {len(rows)} points; the estimate's choice took {loss:.3f} of the best's time", flush=True)
    return path


def measure(
    run: Run, weight: torch.Tensor, scales: torch.Tensor, tokens: int, n: int, k: int, group_size: int
) -> dict[Tiling, float]:
    """Return the microseconds of quantization and product with every tiling that runs."""
    x = torch.randn(tokens, k, device=weight.device).to(DTYPE)
    out = torch.empty(tokens, n, dtype=DTYPE, device=weight.device)
    found = {}
    with backend.place_of(x) as place:
        for tiling in plan.candidates(tokens, n, k, group_size != -1):

            def call(tiling: Tiling = tiling) -> None:
                rest = (weight, scales, None, out, group_size, tiling, place)
                if tiling.fused:
                    backend.multiply_floats(x, *rest)
                else:
                    codes, token_scales = backend.quantize(x, place)
                    backend.multiply(codes, token_scales, *rest)

            what = f"tuning {tokens}x{n}x{k} group {group_size} by {tiling}"
            took = run.attempt(what, partial(run.clock.times, call, 10), of="cuda")
            if took:
                found[tiling] = summary(took)["median"]
    return found
