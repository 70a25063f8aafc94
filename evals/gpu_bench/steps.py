"""The benchmark's steps: environment, ceilings, checks, the grid, decoding in graphs, and the kernels' names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from qtoolkit.evals.gpu_bench import contenders, correctness
from qtoolkit.evals.gpu_bench.clock import graph_series, summary
from qtoolkit.evals.gpu_bench.contenders import DTYPE, Contender, Weight, random_weight
from qtoolkit.evals.gpu_bench.session import Run
from qtoolkit.kernels.selection import Grid

WRONG = 0.3  # |out - want| / |want| of a contender that does not compute the layer: another grid of int4 costs 0.1
LARGE = 8192  # side of the layer that ceilings and names of kernels are taken on
SERIES = ("4096x4096", "8192x8192")
SLOW = ("gemlite",)  # compiles and tunes for minutes: one shape only


def sizes(shape: str) -> tuple[int, int]:
    """Return (n, k) of "NxK"."""
    n, k = shape.split("x")
    return int(n), int(k)


def environment(device: str) -> dict[str, str]:
    """Return what a figure must be read with."""
    found = {"torch": torch.__version__, "python": sys.version.split()[0], "date": time.strftime("%Y-%m-%d")}
    if device == "cuda":
        query = "name,driver_version,clocks.max.sm,power.limit,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        found["card"] = torch.cuda.get_device_name()
        if shutil.which(command[0]):
            found["nvidia-smi"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        from qtoolkit.kernels.cuda import compiler

        found["compiler"] = compiler.version() or "none"
    return found


def ceilings(run: Run) -> dict[str, float]:
    """Measure copy bandwidth (bytes read and written), and the rates of large bf16, int8 and fp8 products."""
    size = LARGE if run.device == "cuda" else 64
    found: dict[str, float] = {}

    def copy() -> None:
        words = min(1 << 30, torch.cuda.mem_get_info()[0] // 32) if run.device == "cuda" else 1 << 16
        source = torch.randint(0, 99, (words,), dtype=torch.int32, device=run.device)
        target = torch.empty_like(source)
        copied = summary(run.clock.times(lambda: target.copy_(source), 20))["median"]
        found["bytes_per_second"] = 2e6 * 4 * words / copied

    def product(name: str) -> None:
        contender = next(c for c in contenders.CONTENDERS if c.name == name)
        call = contender.build(contender.draw(size, size, run.device))(
            torch.randn(size, size, device=run.device).to(DTYPE)
        )
        found[name] = 2e6 * size**3 / summary(run.clock.times(call, 10))["median"]

    run.attempt("ceiling of memory", copy)
    for name in ("torch.mm bf16", "torch._int_mm", "torch._scaled_mm fp8"):
        run.attempt(f"ceiling {name}", partial(product, name))
    return found


def check(run: Run) -> None:
    """Check operators and tilings against float64; a wrong result is the first thing the tables say.

    Seeds come from the system, so that no two runs see the same data; the first is kept. What a process before this one
    has checked is not checked again.
    """
    names = ("cuda", "triton") if run.device == "cuda" else ("reference",)
    checks = run.result.setdefault("checks", {"seed": int.from_bytes(os.urandom(3), "big"), "cases": []})
    seed, done = checks["seed"], {case["what"] for case in checks["cases"]}
    cases = run.attempt("checks of the operator", lambda: list(correctness.operators(names, run.device, seed))) or []
    if run.device == "cuda":
        cases += run.attempt("checks of the tilings", lambda: list(correctness.tilings(run.device, seed + 1000))) or []
    for case in cases:
        if case.what not in done and not run.late():
            outcome = run.attempt(case.what, case.run, case.of) or {"right": False, "failed": True}
            checks["cases"].append({"what": case.what, **outcome})
    if len(cases) > len(checks["cases"]):
        run.could_not.append(f"{len(cases) - len(checks['cases'])} checks: out of time")
    checks["refused"] = sum("refused" in case for case in checks["cases"])
    checks["run"] = len(checks["cases"]) - checks["refused"]
    checks["wrong"] = [case for case in checks["cases"] if case.get("right") is False]
    print(f"checks: {checks['run']} run, {len(checks['wrong'])} wrong, {checks['refused']} refused", flush=True)
    for case in checks["wrong"][:20]:
        print("WRONG", case)


def compile_ahead(shapes: Sequence[str]) -> None:
    """Compile every Hopper kernel that the grid may need, on all cores."""
    from qtoolkit.kernels.cuda import compiler, layout, plan, source

    kernels = set()
    depths = [sizes(shape)[1] for shape in shapes]
    for own in Grid:
        kernels |= {source.quantize(k, False, own) for k in depths}
        for shape in plan.SHAPES:
            for grouped in (False, True) if shape.tokens <= 128 and own is not Grid.FOLDED else (False,):
                if not shape.fused:
                    kernels.add(source.linear(shape, grouped, False, own))
                    continue
                shares = {-(-layout.padded(k) // layout.K_BLOCK // split) for k in depths for split in plan.SPLITS}
                kernels |= {
                    source.linear(shape, grouped, False, own, share)
                    for share in shares
                    if 0 < share <= source.MAX_SHARE
                }
    start = time.monotonic()
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda kernel: compiler.cubin(kernel.text()), kernels))
    print(f"compiled {len(kernels)} kernels in {time.monotonic() - start:.1f} s", flush=True)


def grid(
    run: Run,
    field: Sequence[Contender],
    shapes: Sequence[str],
    tokens: Sequence[int],
    repeats: int,
    times: dict[str, Any],
    reserve: float = 0.0,
) -> None:
    """Time each contender at each point into ``times``, contender by contender: the yardstick and ours come first.

    Each has its share of the time, of which ``reserve`` seconds are left for what follows; what it did not reach is
    noted. Points that are there already are not timed again.
    """
    errors = run.result.setdefault("errors", {})
    for position, contender in enumerate(field):
        start, deadline = time.monotonic(), run.share(len(field) - position, reserve)
        own_shapes = shapes[3:4] or shapes[:1] if contender.name in SLOW else shapes
        own_tokens = tokens if contender.most is None else [m for m in tokens if m <= contender.most]
        for shape in own_shapes:
            there = times.setdefault(contender.name, {}).setdefault(shape, {})
            missing = [m for m in own_tokens if str(m) not in there]
            if not missing:
                continue
            attempt = partial(run.attempt, of=contender.of, patience=contender.patience)
            on = attempt(f"{contender.name} {shape}", partial(layer, contender, shape, run.device))
            if on is None:
                break
            for m in missing:
                what = f"{contender.name} {shape} M={m}"
                if time.monotonic() > deadline and not run.late():
                    run.could_not.append(f"{what} and what follows: its share of {deadline - start:.0f} s was over")
                    break
                took = attempt(what, partial(timed, run, on, m, sizes(shape)[1], repeats))
                if took:
                    there[str(m)] = summary(took) | ({"host_behind": run.clock.behind} if run.clock.behind else {})
            if time.monotonic() > deadline:
                break
        times[contender.name] = {shape: row for shape, row in times.get(contender.name, {}).items() if row}
        if contender.name not in errors and contender.whole and times[contender.name]:
            what = f"{contender.name} against float"
            errors[contender.name] = run.attempt(what, partial(far, contender, own_shapes[0], run.device), contender.of)
        if not times[contender.name]:
            del times[contender.name]
        print(f"{contender.name}: {time.monotonic() - start:.1f} s", flush=True)
        run.keep()


def void(run: Run) -> None:
    """Name the contenders that computed something else: their times say nothing."""
    for name, error in run.result.get("errors", {}).items():
        if error is not None and error > WRONG:
            run.could_not.append(
                f"{name}: its result is not the layer's (relative distance {error:.2f}); times are void"
            )


def layer(contender: Contender, shape: str, device: str) -> Callable[[torch.Tensor], Callable[[], object]]:
    """Return what runs a random layer of ``shape``."""
    return contender.build(contender.draw(*sizes(shape), device))


def timed(
    run: Run, on: Callable[[torch.Tensor], Callable[[], object]], tokens: int, k: int, repeats: int
) -> list[float]:
    """Return the microseconds of a contender on random tokens; what it prepares for them does not count."""
    return run.clock.times(on(torch.randn(tokens, k, device=run.device).to(DTYPE)), repeats)


def built(contender: Contender, weights: Sequence[Weight]) -> list[Callable[[torch.Tensor], Callable[[], object]]]:
    """Return what runs each of ``weights``."""
    return [contender.build(weight) for weight in weights]


def replayed(rows: Sequence[Callable[[torch.Tensor], Callable[[], object]]], x: torch.Tensor) -> float:
    """Return the microseconds of a layer inside a graph of all ``rows``."""
    return graph_series([on(x) for on in rows])


def far(contender: Contender, shape: str, device: str, tokens: int = 32) -> float:
    """Return how far a contender's result is from the layer in float: that it computes the same thing at all."""
    weight = contender.draw(*sizes(shape), device)
    x = torch.randn(tokens, weight.shape[1], device=device).to(DTYPE)
    out: Any = contender.build(weight)(x)()
    return round(correctness.distance(out, x.double() @ weight.dense().double().T), 4)


def spread(run: Run, shapes: Sequence[str], tokens: Sequence[int], repeats: int) -> float | None:
    """Time ours a second time; return the largest relative difference between the two medians."""
    first = run.result["times"].get("ours", {})
    again: dict[str, Any] = {}
    grid(run, [contenders.OURS], shapes, tokens, repeats, again)
    pairs = [
        (row[m]["median"], first[s][m]["median"])
        for s, row in again.get("ours", {}).items()
        for m in row
        if m in first.get(s, {})
    ]
    found = [abs(b / a - 1) for a, b in pairs]
    return round(max(found), 4) if found else None


def series(run: Run, most: int = 32) -> dict[str, dict[str, float]]:
    """Time decoding inside CUDA graphs: a row of layers with weights of their own, 256 MB of int4 together."""
    found: dict[str, dict[str, float]] = {}
    for n, k in map(sizes, SERIES):
        count = min(most, (1 << 29) // (n * k))
        weights = [random_weight(n, k, -1, run.device, seed) for seed in range(count)]
        for contender in (contenders.YARDSTICK, contenders.OURS, contenders.TWO_LAUNCHES, contenders.HUMMING):
            rows = run.attempt(f"series {contender.name} {n}x{k}", partial(built, contender, weights), contender.of)
            for m in (1, 16, 64) if rows else ():
                x = torch.randn(m, k, device=run.device).to(DTYPE)
                what = f"series {contender.name} {n}x{k} M={m}"
                took = run.attempt(what, partial(replayed, rows, x), contender.of, contender.patience)
                if took:
                    found.setdefault(contender.name, {})[f"{n}x{k} M={m}"] = round(took, 2)
    return found


def kernel_names(run: Run, field: Iterable[Contender]) -> dict[str, list[str]]:
    """Return the device kernels that each contender launched at 16 and 1024 tokens."""
    found: dict[str, list[str]] = {}
    n = k = LARGE

    def names(contender: Contender) -> None:
        on = contender.build(contender.draw(n, k, run.device))
        for m in (16, 1024):
            call = on(torch.randn(m, k, device=run.device).to(DTYPE))
            call()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                call()
                torch.cuda.synchronize()
            on_device = [e.key[:120] for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
            found[f"{contender.name} M={m}"] = on_device

    for contender in field:
        if contender.name not in SLOW and contender.name in run.result.get("times", {}):
            run.attempt(f"kernel names of {contender.name}", partial(names, contender), contender.of)
    return found
