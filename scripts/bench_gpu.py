"""Checks and times the W4A8 GPU kernels beside their peers on this machine, and writes one JSON file and tables.

    python scripts/bench_gpu.py --out gpu.json            everything, at most 8 minutes on one H100
    python scripts/bench_gpu.py --quick --out gpu.json    checks, one shape, few token counts: about a minute
    python scripts/bench_gpu.py --tune --out gpu.json     also times every tiling; the table is written beside gpu.json
    python scripts/bench_gpu.py --plan                    what would run; needs no GPU
    python scripts/bench_gpu.py --report gpu.json         the tables of a result, also of one that was cut short

The JSON file is rewritten after every step, so a run that is cut keeps what it had; a kernel that never returns is
ended at the deadline. Peers that are not installed (humming-kernels, gemlite) are named at the end, with everything
else that could not run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("qtoolkit") is None:  # not installed: take it from this checkout
    sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch

from qtoolkit.evals.gpu_bench import contenders, report, steps
from qtoolkit.evals.gpu_bench.clock import CpuClock, GpuClock
from qtoolkit.evals.gpu_bench.contenders import Contender
from qtoolkit.evals.gpu_bench.session import GRACE, Run

SHAPES = ("4096x4096", "14336x4096", "4096x14336", "8192x8192", "28672x8192")  # n x k
TOKENS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 512, 1024, 4096)
QUICK = (("8192x8192",), (1, 16, 64, 128, 256, 1024))


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--quick", action="store_true", help="one shape and few token counts")
    parser.add_argument("--tune", action="store_true", help="time every tiling first and write this card's table")
    parser.add_argument("--plan", action="store_true", help="say what would run, and end")
    parser.add_argument("--report", type=Path, help="print the tables of a result, and end")
    parser.add_argument("--shapes", help='"NxK,NxK"')
    parser.add_argument("--tokens", help='"1,16,4096"')
    parser.add_argument("--only", help="contenders by name, separated by ;  torch.mm is always in")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=440, help="start nothing new after so long")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to try this script")
    asked = parser.parse_args(words)
    if asked.out is None and asked.report is None and not asked.plan:
        parser.error("--out FILE is needed")
    return asked


def chosen(only: str | None, gpu: bool) -> list[Contender]:
    """Return the contenders that were asked for; raises ValueError for a name that there is not."""
    everyone = contenders.CONTENDERS if gpu else contenders.ON_A_CPU
    if only is None:
        return list(everyone)
    names = {name.strip() for name in only.split(";")}
    unknown = names - {contender.name for contender in everyone}
    if unknown:
        raise ValueError(f"no contender is named {sorted(unknown)}; known: {'; '.join(c.name for c in everyone)}")
    return [c for c in everyone if c.kind == "bf16" or c.name in names]


def plan_text(field: Sequence[Contender], shapes: Sequence[str], tokens: Sequence[int], repeats: int) -> str:
    """Return what a run would do, with a rough time from rooflines; what is missing is named."""
    lines = []
    total = 0.0
    for contender in field:
        own_tokens = [m for m in tokens if contender.most is None or m <= contender.most]
        own_shapes = shapes[3:4] or shapes[:1] if contender.name in steps.SLOW else shapes
        roofs = [report.roofline(m, *steps.sizes(shape), 3.0e12, 1.4e15) for shape in own_shapes for m in own_tokens]
        seconds = (repeats + 2) * sum(4 * roof + 400 for roof in roofs) / 1e6  # 400 us: two flushes, and the host
        total += seconds
        package = next((p for words, p in contenders.PACKAGES.items() if contender.name.startswith(words)), None)
        missing = f"; {package} is not installed" if package and find_spec(package) is None else ""
        lines.append(f"{contender.name}: {len(roofs)} points, about {seconds:.1f} s and its compilation{missing}")
    return "\n".join([*lines, f"grid: about {total:.0f} s without compilation"])


def print_report(result: Mapping[str, Any]) -> None:
    """Print a result's tables, and everything that could not run."""
    rates = result.get("ceilings") or {}
    int8 = max(rates.get("torch._int_mm", 0), rates.get("torch._scaled_mm fp8", 0)) or 1.4e15
    kinds = {c.name: c.kind for c in (*contenders.CONTENDERS, *contenders.ON_A_CPU)}
    print(result.get("environment"), {k: f"{v:.3e}" for k, v in rates.items()})
    print(report.tables(result.get("times") or {}, kinds, rates.get("bytes_per_second") or 3.0e12, int8))
    for name in ("spread", "errors", "tuning", "series", "kernels"):
        if result.get(name):
            print(f"{name}: {json.dumps(result[name], indent=1)}")
    print("could not run:", *(result.get("could_not") or ["nothing"]), sep="\n  ")
    checks = result.get("checks") or {"run": 0, "wrong": []}
    print(f"checks: {checks['run']} run, {len(checks['wrong'])} wrong")
    if not result.get("finished", True):
        print("this result is of a run that was cut short")


def measure(
    run: Run, asked: argparse.Namespace, field: Sequence[Contender], shapes: list[str], tokens: list[int]
) -> None:
    """Do every step, keeping the result after each."""
    gpu = run.device == "cuda"
    run.result["environment"] = steps.environment(run.device)
    if gpu:
        run.attempt("compiling ahead", lambda: steps.compile_ahead(shapes))
    run.result["ceilings"] = steps.ceilings(run)
    print(run.result["environment"], {k: f"{v:.3e}" for k, v in run.result["ceilings"].items()}, flush=True)
    run.keep()
    steps.check(run)
    run.keep()
    if asked.tune and gpu:
        from qtoolkit.evals.gpu_bench import tuning
        from qtoolkit.kernels.cuda import plan

        path = run.attempt("tuning", lambda: tuning.tune(run, shapes, tokens, asked.out.resolve().parent))
        if path is not None and path.is_file():
            os.environ["QTOOLKIT_TUNING"] = str(path.parent)  # what follows is measured with the new table
            plan.table.cache_clear()
            plan.choose.cache_clear()
            print(f"wrote {path}", flush=True)
        run.keep()
    steps.grid(run, field, shapes, tokens, asked.repeats)
    if gpu:
        run.result["spread"] = run.attempt("spread", lambda: steps.spread(run, shapes, tokens, asked.repeats))
        run.keep()
        if asked.only is None:
            run.result["series"] = run.attempt("CUDA-graph series", lambda: steps.series(run))
            run.keep()
            run.result["kernels"] = run.attempt("kernel names", lambda: steps.kernel_names(run, field))
            run.keep()


def main(words: Sequence[str] | None = None) -> int:
    """Run what was asked for; 0 if all checks held, 1 if not or if there is no GPU, 2 for a wrong request."""
    asked = arguments(words)
    if asked.report is not None:
        print_report(json.loads(asked.report.read_text()))
        return 0
    gpu = asked.device == "cuda"
    shapes, tokens = map(list, QUICK if asked.quick else (SHAPES, TOKENS))
    try:
        field = chosen(asked.only, gpu)
        shapes = asked.shapes.split(",") if asked.shapes else shapes
        tokens = [int(m) for m in asked.tokens.split(",")] if asked.tokens else tokens
        for shape in shapes:
            steps.sizes(shape)
    except ValueError as error:
        print(f"bench_gpu: {error}", file=sys.stderr)
        return 2
    if asked.plan:
        print(plan_text(field, shapes, tokens, asked.repeats))
        return 0
    if gpu and not torch.cuda.is_available():
        print("no CUDA device: this script measures GPUs (--plan and --device cpu try the script)", file=sys.stderr)
        return 1
    until = time.monotonic() + asked.seconds
    run = Run(asked.device, GpuClock() if gpu else CpuClock(), until, asked.out)
    guard = run.guard()
    print(f"nothing new starts after {asked.seconds:.0f} s; the process ends {GRACE:.0f} s later at most", flush=True)
    try:
        measure(run, asked, field, shapes, tokens)
    finally:
        guard.cancel()
        run.keep()
    run.keep(finished=True)
    if not gpu:
        print("these figures try the script on a CPU; they say nothing about the kernels")
    print_report({**run.result, "could_not": run.could_not})
    checks = run.result["checks"]
    return 1 if checks["wrong"] or not checks["run"] else 0


if __name__ == "__main__":
    sys.exit(main())
