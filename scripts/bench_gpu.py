"""Checks and times the W4A8 GPU kernels beside their peers on this machine, and writes one JSON file and tables.

    python scripts/bench_gpu.py --out gpu.json            everything, at most 8 minutes on one H100
    python scripts/bench_gpu.py --quick --out gpu.json    checks, one shape, few token counts: about a minute
    python scripts/bench_gpu.py --tune --out gpu.json     also times every tiling; the table is written beside gpu.json
    python scripts/bench_gpu.py --plan                    what would run; needs no GPU
    python scripts/bench_gpu.py --report gpu.json         the tables of a result, also of one that was cut short

The JSON file is rewritten as the run goes, so a run that is cut keeps what it had. All figures come from one process; a
kernel that never returns, or one after which the device answers no more, ends it, and another goes on without that
step. Peers that are not installed (humming-kernels, gemlite) are named at the end, with everything that could not run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("qtoolkit") is None:  # not installed: take it from this checkout
    sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch

from qtoolkit.evals.gpu_bench import contenders, report, steps, watch
from qtoolkit.evals.gpu_bench.clock import CpuClock, GpuClock
from qtoolkit.evals.gpu_bench.contenders import Contender
from qtoolkit.evals.gpu_bench.session import PATIENCE, Run

SHAPES = ("4096x4096", "14336x4096", "4096x14336", "8192x8192", "28672x8192")  # n x k
TOKENS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 512, 1024, 4096)
QUICK = (("8192x8192",), (1, 16, 64, 128, 256, 1024))
RESERVE = 60.0  # seconds of a run for what follows the grid: spread, graphs, names of kernels


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
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # marks the process that measures, see ``watch``
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
    checks = result.get("checks") or {}
    print(f"checks: {checks.get('run', 0)} run, {len(checks.get('wrong', []))} wrong")
    if result.get("lost"):
        print(f"measured by {len(result['lost']) + 1} processes, see above")
    if not result.get("finished", True):
        print("this result is of a run that was cut short")


def measure(
    run: Run, asked: argparse.Namespace, field: Sequence[Contender], shapes: list[str], tokens: list[int]
) -> None:
    """Do every step that the result does not hold already, keeping it after each."""
    gpu, result = run.device == "cuda", run.result

    def once(name: str, step: Callable[[], Any], patience: float = PATIENCE) -> None:
        if result.get(name) is None:
            result[name] = run.attempt(name, step, patience=patience)
            run.keep()

    once("environment", lambda: steps.environment(run.device))
    if gpu:
        run.attempt("compiling ahead", lambda: steps.compile_ahead(shapes), patience=180.0)
    once("ceilings", lambda: steps.ceilings(run))
    print(result["environment"], {k: f"{v:.3e}" for k, v in (result["ceilings"] or {}).items()}, flush=True)
    steps.check(run)
    run.keep()
    if asked.tune and gpu:
        tune(run, shapes, tokens, asked.out.resolve().parent)
    times = result.setdefault("times", {})
    quick = [contender for contender in field if contender.name not in steps.SLOW]
    steps.grid(run, quick, shapes, tokens, asked.repeats, times, RESERVE if gpu else 0.0)
    if gpu:
        once("spread", lambda: steps.spread(run, shapes, tokens, asked.repeats))
        if asked.only is None:
            once("series", lambda: steps.series(run))
            once("kernels", lambda: steps.kernel_names(run, quick))
    steps.grid(run, [contender for contender in field if contender not in quick], shapes, tokens, asked.repeats, times)
    steps.void(run)


def tune(run: Run, shapes: Sequence[str], tokens: Sequence[int], folder: Path) -> None:
    """Write this card's table, unless a process before this one has, and let what follows be measured with it."""
    from qtoolkit.evals.gpu_bench import tuning
    from qtoolkit.kernels.cuda import plan

    if "tuning" not in run.result:
        run.attempt("tuning", lambda: tuning.tune(run, shapes, tokens, folder))
        run.keep()
    os.environ["QTOOLKIT_TUNING"] = str(folder)
    plan.table.cache_clear()
    plan.choose.cache_clear()


def opened(asked: argparse.Namespace) -> Run:
    """Return the run, with what a process before this one has found."""
    held = json.loads(asked.out.read_text()) if asked.out.exists() else {}
    notes = held.pop("could_not", [])
    held.pop("finished", None)
    clock = GpuClock() if asked.device == "cuda" else CpuClock()
    return Run(asked.device, clock, asked.until, asked.out, held, notes)


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
    if asked.until is not None:  # this is the process that measures
        watch.end_with_parent()
        run = opened(asked)
        try:
            measure(run, asked, field, shapes, tokens)
        finally:
            run.keep()
        run.keep(finished=True)
        return 0
    return watched(asked, sys.argv[1:] if words is None else words)


def watched(asked: argparse.Namespace, words: Sequence[str]) -> int:
    """Let another process measure, and print what it found, however it ended."""
    asked.out.unlink(missing_ok=True)
    until = time.monotonic() + asked.seconds
    print(f"nothing new starts after {asked.seconds:.0f} s; all ends {watch.GRACE:.0f} s later at most", flush=True)
    watch.supervise([sys.executable, str(Path(__file__).resolve()), *words, "--until", str(until)], asked.out, until)
    if not asked.out.exists():
        print("nothing was measured: the reason stands above", file=sys.stderr)
        return 1
    result = json.loads(asked.out.read_text())
    if asked.device != "cuda":
        print("these figures try the script on a CPU; they say nothing about the kernels")
    print_report(result)
    checks = result.get("checks", {})
    return 1 if checks.get("wrong") or not checks.get("run") or not result["finished"] else 0


if __name__ == "__main__":
    sys.exit(main())
