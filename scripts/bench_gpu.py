"""Checks and times the W4A8 GPU kernels beside their peers on this machine, and writes one JSON file and tables.

    python scripts/bench_gpu.py --out gpu.json            everything, at most about 8 minutes on one H100
    python scripts/bench_gpu.py --quick --out gpu.json    checks, one shape, few token counts: about a minute
    python scripts/bench_gpu.py --tune --out gpu.json     also times every tiling and writes kernels/tuning/CARD.json

Peers that are not installed (humming-kernels, gemlite) are named at the end, with everything else that could not run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("qtoolkit") is None:  # not installed: take it from this checkout
    sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch

from qtoolkit.evals.gpu_bench import contenders, correctness, report
from qtoolkit.evals.gpu_bench.clock import Clock, CpuClock, GpuClock, graph_series, summary
from qtoolkit.evals.gpu_bench.contenders import DTYPE, Contender, Weight, random_weight

SHAPES = ("4096x4096", "14336x4096", "4096x14336", "8192x8192", "28672x8192")  # n x k
TOKENS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 512, 1024, 4096)
QUICK = (("8192x8192",), (1, 16, 64, 128, 256, 1024))
SLOW = ("gemlite",)  # compiles and tunes for minutes: one shape only


@dataclass
class Run:
    """What a run has found so far, and until when it may look for more."""

    device: str
    clock: Clock
    until: float
    result: dict[str, Any] = field(default_factory=dict)
    could_not: list[str] = field(default_factory=list)

    def late(self) -> bool:
        """Return whether nothing new may start."""
        return time.monotonic() > self.until

    def attempt(self, what: str, step: Callable[[], Any]) -> Any:
        """Run ``step``; a failure or a lack of time is noted and printed at the end, and the run goes on."""
        if self.late():
            self.could_not.append(f"{what}: out of time")
            return None
        try:
            return step()
        except Exception as error:  # one contender must not end the run; the reason is reported
            words = str(error).strip().splitlines() or [""]
            self.could_not.append(f"{what}: {type(error).__name__}: {words[0][:200]}")
            return None


def environment(device: str) -> dict[str, str]:
    """Return what a figure must be read with."""
    found = {"torch": torch.__version__, "python": sys.version.split()[0], "date": time.strftime("%Y-%m-%d")}
    if device == "cuda":
        query = "name,driver_version,clocks.max.sm,power.limit"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        found["card"] = torch.cuda.get_device_name()
        if shutil.which(command[0]):
            found["nvidia-smi"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        from qtoolkit.kernels.cuda import compiler

        found["compiler"] = compiler.version() or "none"
    return found


def ceilings(run: Run) -> dict[str, float]:
    """Measure copy bandwidth (bytes read and written), and the rates of large bf16, int8 and fp8 products."""
    size = 8192 if run.device == "cuda" else 64
    found: dict[str, float] = {}
    words = 1 << 30 if run.device == "cuda" else 1 << 16
    source = torch.randint(0, 99, (words,), dtype=torch.int32, device=run.device)
    target = torch.empty_like(source)
    copied = summary(run.clock.times(lambda: target.copy_(source), 20))["median"]
    found["bytes_per_second"] = 2e6 * 4 * words / copied
    weight = random_weight(size, size, -1, run.device)
    x = torch.randn(size, size, device=run.device).to(DTYPE)
    for name in ("torch.mm bf16", "torch._int_mm", "torch._scaled_mm fp8"):
        contender = next(c for c in contenders.CONTENDERS if c.name == name)
        took = run.attempt(f"ceiling {name}", lambda c=contender: run.clock.times(c.build(weight)(x), 10))
        if took:
            found[name] = 2e6 * size**3 / summary(took)["median"]
    return found


def check(run: Run) -> None:
    """Check operators and tilings against float64; a wrong result is the first thing the tables say."""
    names = ("cuda", "triton") if run.device == "cuda" else ("reference",)
    cases = run.attempt("checks of the operator", lambda: list(correctness.operators(names, run.device, 0))) or []
    if run.device == "cuda":
        cases += run.attempt("checks of the tilings", lambda: list(correctness.tilings(run.device, 1000))) or []
    wrong = [case for case in cases if case.get("right") is False]
    refused = sum("refused" in case for case in cases)
    run.result["checks"] = {"run": len(cases) - refused, "refused": refused, "wrong": wrong, "cases": cases}
    print(f"checks: {len(cases) - refused} run, {len(wrong)} wrong, {refused} refused", flush=True)
    for case in wrong[:20]:
        print("WRONG", case)


def compile_ahead(run: Run, shapes: Sequence[str], tokens: Sequence[int]) -> None:
    """Compile every Hopper kernel that the grid may need, on all cores."""
    from qtoolkit.kernels.cuda import compiler, plan, source

    kernels = {source.linear(tiling, grouped, False) for tiling in plan.SHAPES for grouped in (False, True)
               if not (grouped and tiling.tokens == 256)}  # fmt: skip
    kernels |= {source.quantize(int(shape.split("x")[1]), False) for shape in shapes}
    start = time.monotonic()
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda kernel: compiler.cubin(kernel.text()), kernels))
    print(f"compiled {len(kernels)} kernels in {time.monotonic() - start:.1f} s", flush=True)


def sizes(shape: str) -> tuple[int, int]:
    """Return (n, k) of "NxK"."""
    n, k = shape.split("x")
    return int(n), int(k)


def tune(run: Run, shapes: Sequence[str], tokens: Sequence[int], path: Path) -> None:
    """Time every tiling at every point and write the best ones as this card's table."""
    from qtoolkit.kernels.cuda import backend, layout, plan

    chosen: dict[str, list[int]] = {}
    margins = []
    for shape in shapes:
        n, k = sizes(shape)
        for group_size in (-1, 128):
            weight = random_weight(n, k, group_size, run.device)
            own, scales = layout.to_fragments(weight.codes), layout.to_kernel_scales(weight.scales, group_size)
            for m in tokens:
                x = torch.randn(m, k, device=run.device).to(DTYPE)
                out = torch.empty(m, n, dtype=DTYPE, device=run.device)
                with backend.place_of(x) as place:
                    codes, token_scales = backend.quantize(x, place)
                    times = {}
                    for tiling in plan.candidates(m, n, k, group_size != -1):
                        arguments = (codes, token_scales, own, scales, None, out, group_size, tiling, place)
                        times[tiling] = summary(run.clock.times(lambda a=arguments: backend.multiply(*a), 10))["median"]
                    model = plan.choose(m, n, k, group_size != -1, "", place.multiprocessors)
                best = min(times, key=times.__getitem__)
                margins.append(times[model] / times[best])
                chosen[f"{m},{n},{k},{int(group_size != -1)}"] = [best.tokens, best.blocks, best.split, best.resident]
    path.parent.mkdir(exist_ok=True)
    note = {"card": torch.cuda.get_device_name(), "date": time.strftime("%Y-%m-%d")}
    lines = ",\n".join(f'  "{point}": {values}' for point, values in chosen.items())  # a line a point, for diffs
    path.write_text(json.dumps(note)[:-1] + f', "tilings": {{\n{lines}\n}}}}\n')
    plan.table.cache_clear()
    plan.choose.cache_clear()
    print(f"tuned {len(chosen)} points; the model's choice took {sum(margins) / len(margins):.3f} of the best's time")


def grid(run: Run, field_: Iterable[Contender], shapes: Sequence[str], tokens: Sequence[int], repeats: int) -> None:
    """Time each contender at each point, contender by contender: the yardstick and ours come first."""
    times = run.result.setdefault("times", {})
    for contender in field_:
        start = time.monotonic()
        for shape in shapes[3:4] or shapes[:1] if contender.name in SLOW else shapes:
            n, k = sizes(shape)
            weight = random_weight(n, k, contender.group_size, run.device)
            on = run.attempt(f"{contender.name} {shape}", lambda c=contender, w=weight: c.build(w))
            if on is None:
                break
            for m in tokens:
                x = torch.randn(m, k, device=run.device).to(DTYPE)
                what = f"{contender.name} {shape} M={m}"
                took = run.attempt(what, lambda on=on, x=x: run.clock.times(on(x), repeats))
                if run.late():
                    break
                if took:
                    times.setdefault(contender.name, {}).setdefault(shape, {})[str(m)] = summary(took)
        print(f"{contender.name}: {time.monotonic() - start:.1f} s", flush=True)


def spread(run: Run, shapes: Sequence[str], tokens: Sequence[int], repeats: int) -> float | None:
    """Time ours a second time; return the largest relative difference between the two medians."""
    first = run.result["times"].get("ours", {})
    again = Run(run.device, run.clock, run.until)
    grid(again, [c for c in contenders.CONTENDERS if c.name == "ours"], shapes, tokens, repeats)
    second = again.result["times"].get("ours", {})
    pairs = [(row[m]["median"], first[s][m]["median"]) for s, row in second.items() for m in row if m in first[s]]
    found = [abs(b / a - 1) for a, b in pairs]
    return round(max(found), 4) if found else None


def series(run: Run, shapes: Sequence[str] = ("4096x4096", "8192x8192"), most: int = 32) -> dict[str, dict[str, float]]:
    """Time decoding inside CUDA graphs: a row of layers with weights of their own, 256 MB of int4 together."""
    found: dict[str, dict[str, float]] = {}
    for n, k in map(sizes, shapes):
        count = min(most, (1 << 29) // (n * k))
        weights = [random_weight(n, k, -1, run.device, seed) for seed in range(count)]
        for contender in (contenders.YARDSTICK, contenders.OURS, contenders.HUMMING):
            build: Callable[[Weight], Any] = contender.build
            rows = run.attempt(f"series {contender.name}", lambda b=build, w=weights: [b(one) for one in w])
            for m in (1, 16, 64) if rows else ():
                x = torch.randn(m, k, device=run.device).to(DTYPE)
                took = run.attempt(
                    f"series {contender.name} {n}x{k} M={m}",
                    lambda rows=rows, x=x: graph_series([on(x) for on in rows]),
                )
                if took:
                    found.setdefault(contender.name, {})[f"{n}x{k} M={m}"] = round(took, 2)
    return found


def kernel_names(run: Run, shape: str = "8192x8192") -> dict[str, list[str]]:
    """Return the device kernels that each contender launched at 16 and 1024 tokens."""
    found: dict[str, list[str]] = {}
    n, k = sizes(shape)
    for contender in contenders.CONTENDERS:
        if contender.name in SLOW or contender.name not in run.result["times"]:
            continue
        on = contender.build(random_weight(n, k, contender.group_size, run.device))
        for m in (16, 1024):
            call = on(torch.randn(m, k, device=run.device).to(DTYPE))
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                call()
                torch.cuda.synchronize()
            found[f"{contender.name} M={m}"] = [event.key[:120] for event in profile.key_averages()]
    return found


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--quick", action="store_true", help="one shape and few token counts")
    parser.add_argument("--tune", action="store_true", help="time every tiling first and write this card's table")
    parser.add_argument("--shapes", help='"NxK,NxK"')
    parser.add_argument("--tokens", help='"1,16,4096"')
    parser.add_argument("--only", help="contenders by name, comma-separated; torch.mm is always in")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=450, help="start nothing new after so long")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to try this script")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run everything that was asked for; 0 if all checks held, 1 if not or if there is no GPU."""
    asked = arguments(words)
    gpu = asked.device == "cuda"
    if gpu and not torch.cuda.is_available():
        print("no CUDA device: this script measures GPUs (--device cpu tries the script itself)", file=sys.stderr)
        return 1
    shapes, tokens = map(list, QUICK if asked.quick else (SHAPES, TOKENS))
    shapes = asked.shapes.split(",") if asked.shapes else shapes
    tokens = [int(m) for m in asked.tokens.split(",")] if asked.tokens else tokens
    field_: Sequence[Contender] = contenders.CONTENDERS if gpu else contenders.ON_A_CPU
    if asked.only:
        field_ = [c for c in field_ if c.kind == "bf16" or c.name in asked.only.split(",")]
    run = Run(asked.device, GpuClock() if gpu else CpuClock(), time.monotonic() + asked.seconds)

    run.result["environment"] = environment(asked.device)
    if gpu:
        run.attempt("compiling ahead", lambda: compile_ahead(run, shapes, tokens))
    run.result["ceilings"] = ceilings(run)
    print(run.result["environment"], {k: f"{v:.3e}" for k, v in run.result["ceilings"].items()}, flush=True)
    check(run)
    if asked.tune:
        from qtoolkit.kernels.cuda import plan

        run.attempt("tuning", lambda: tune(run, shapes, tokens, plan.table_path(torch.cuda.get_device_name())))
    grid(run, field_, shapes, tokens, asked.repeats)
    run.result["spread"] = spread(run, shapes, tokens, asked.repeats) if gpu else None
    if gpu and not asked.only:
        run.result["series"] = run.attempt("CUDA-graph series", lambda: series(run))
        run.result["kernels"] = run.attempt("kernel names", lambda: kernel_names(run))
    run.result["could_not"] = run.could_not
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(run.result, indent=1) + "\n")

    rates = run.result["ceilings"]
    int8 = max(rates.get("torch._int_mm", 0), rates.get("torch._scaled_mm fp8", 0)) or 1.4e15
    if not gpu:
        print("these figures try the script on a CPU; they say nothing about the kernels")
    print(report.tables(run.result["times"], {c.name: c.kind for c in field_}, rates["bytes_per_second"], int8))
    for name in ("spread", "series", "kernels"):
        if run.result.get(name):
            print(f"{name}: {json.dumps(run.result[name], indent=1)}")
    print("could not run:", *(run.could_not or ["nothing"]), sep="\n  ")
    wrong = run.result["checks"]["wrong"]
    print(f"checks: {run.result['checks']['run']} run, {len(wrong)} wrong")
    return 1 if wrong or not run.result["checks"]["run"] else 0


if __name__ == "__main__":
    sys.exit(main())
