"""Times linear-layer kernels against each other in one process, in turns, beside the machine's own measured limits."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtoolkit.errors import RequestError
from qtoolkit.evals.kernel_peers import Contestant, Timer, peers
from qtoolkit.evals.kernel_remote import Worker
from qtoolkit.evals.kernel_workers import loop
from qtoolkit.kernels.cpu import library

SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096))  # (k, n)
TOKENS = (1, 4, 16, 64, 256, 1024)
LARGEST_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")  # such as 32768K
ROTATED = (128 << 20, 512 << 20)  # bytes of weights a contestant walks through at least, and at most
READ = 32 << 20  # bytes of one bandwidth probe
PROBED = 512 << 20  # bytes the probes walk through
OURS = "qtoolkit-g128"


@dataclass
class Limits:
    """Probes of what the machine gives all threads right now."""

    buffer: Tensor
    position: int = 0

    def bandwidth(self) -> float:
        """Return bytes a second of reading memory in order."""
        part = self.buffer[self.position : self.position + READ]
        self.position = (self.position + READ) % (self.buffer.numel() - READ + 1)
        return READ / library.load().functions.qtk_read(part.data_ptr(), READ)

    def operations(self) -> float:
        """Return int8 operations a second of the chosen code path's dot products, from registers."""
        own = library.load()
        return own.functions.qtk_dot_peak(own.path_id, 40_000)


def limits() -> Limits | None:
    """Return probes, or None where there is no compiled library to probe with."""
    if library.failure() is not None:
        return None
    buffer = torch.empty(PROBED, dtype=torch.uint8)
    library.load().functions.qtk_advise(buffer.data_ptr(), PROBED)
    return Limits(buffer.random_())


def run(
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    tokens: tuple[int, ...] = TOKENS,
    names: tuple[str, ...] | None = None,
    seconds: float = 2.0,
    progress: Callable[[str], None] | None = None,
    workers: Sequence[Worker] = (),
) -> dict[str, Any]:
    """Time every contestant on every shape and number of tokens.

    Args:
        shapes: (k, n) pairs; multiples of 128.
        tokens: numbers of rows m.
        names: contestants to keep; all that run here when None.
        seconds: time for one (shape, tokens), all contestants together; each has five turns at least.
        progress: called with a line at each (shape, tokens).
        workers: processes with contestants that need a Python of their own.

    Returns:
        ``limits`` {bandwidth_gbs, int8_gops} (medians over the run, None without a compiled library), ``rows``
        [{k, n, m, name, median_us, min_us, max_us, runs, gbs, gops, of_limit}], ``machine`` and ``refused`` {name:
        why}, the contestants that could not multiply on this machine. ``of_limit`` is the
        time that the probes taken between the same runs allow, over the median time: the longer of weight bytes
        over bandwidth and, for int8 contestants, operations over the int8 peak.
    """
    contestants = peers(names, workers)
    share = _rotated(len(contestants))
    probe = limits()
    rows: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    seen: list[tuple[float, float]] = []
    with torch.inference_mode():
        for k, n in shapes:
            torch.manual_seed(k * 31 + n)
            timers: dict[str, Timer] = {}
            for peer in contestants:
                try:
                    timers[peer.name] = peer.timer(k, n, _copies(peer, k, n, share))
                    for m in tokens:
                        timers[peer.name](torch.randn(m, k, dtype=torch.bfloat16))
                except RuntimeError as error:  # such as oneDNN's, without an instruction that it needs
                    refused[peer.name] = " ".join(str(error).split())
            contestants = tuple(peer for peer in contestants if peer.name not in refused)
            timers = {peer.name: timers[peer.name] for peer in contestants}
            if not contestants:
                raise RequestError("No contestant could multiply.", f"{peer.name}: {refused[peer.name]}.")
            for m in tokens:
                if progress:
                    progress(f"{k} x {n}, {m} tokens")
                x = torch.randn(m, k, dtype=torch.bfloat16)
                times, probes = _in_turns(timers, x, probe, seconds)
                seen += probes
                rows += [_row(peer, k, n, m, times[peer.name], probes) for peer in contestants]
    middle = [statistics.median(values) / 1e9 for values in zip(*seen, strict=True)] if seen else [None, None]
    return {
        "limits": dict(zip(("bandwidth_gbs", "int8_gops"), middle, strict=True)),
        "machine": _machine(),
        "rows": rows,
        "refused": refused,
    }


def _copies(peer: Contestant, k: int, n: int, share: int) -> int:
    return max(3, math.ceil(share / (k * n * peer.weight_bits / 8)))


def _rotated(contestants: int) -> int:
    """Return bytes of weights for each: twice what the largest cache holds, and at most ``ROTATED[1]``.

    All of them take a quarter of the memory, unless ``ROTATED[0]`` is more.
    """
    try:
        cache = int(LARGEST_CACHE.read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):  # not Linux, or a machine without a third cache
        cache = 0
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # peers keep copies of their own beside
    return max(ROTATED[0], min(2 * cache, ROTATED[1], memory // 4 // max(1, contestants)))


def _in_turns(
    timers: dict[str, Timer], x: Tensor, probe: Limits | None, seconds: float
) -> tuple[dict[str, list[float]], list[tuple[float, float]]]:
    times: dict[str, list[float]] = {name: [] for name in timers}
    probes: list[tuple[float, float]] = []
    for timer in timers.values():
        timer(x)  # first calls build caches
    end, turns = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turns < 5:
        turns += 1
        if probe:
            loop.warm(probe.bandwidth)
            probes.append((probe.bandwidth(), probe.operations()))
        for name, timer in timers.items():
            times[name] += timer(x)
    return times, probes


def _row(
    peer: Contestant, k: int, n: int, m: int, times: list[float], probes: list[tuple[float, float]]
) -> dict[str, Any]:
    middle, weight_bytes, operations = statistics.median(times), k * n * peer.weight_bits / 8, 2.0 * k * n * m
    allowed = None
    if probes:
        bandwidth, peak = (statistics.median(values) for values in zip(*probes, strict=True))
        allowed = max(weight_bytes / bandwidth, operations / peak if peer.integer and peak else 0.0)
    return {
        "k": k, "n": n, "m": m, "name": peer.name,
        "median_us": middle * 1e6, "min_us": min(times) * 1e6, "max_us": max(times) * 1e6, "runs": len(times),
        "gbs": weight_bytes / middle / 1e9, "gops": operations / middle / 1e9,
        "of_limit": None if allowed is None else allowed / middle,
    }  # fmt: skip


def _machine() -> dict[str, Any]:
    own = library.describe()
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "path": own["path"],
        "reason": own["reason"],
    }


def table(result: dict[str, Any]) -> str:
    """Render a result as text: for each shape and number of tokens, times, and how many times ours each one takes."""
    lines = []
    bandwidth, peak = (result["limits"][name] for name in ("bandwidth_gbs", "int8_gops"))
    if bandwidth:
        lines.append(f"limits measured beside: {bandwidth:.1f} GB/s, {peak:.0f} int8 GOPS")
    lines.append(f"{'k x n':>13} {'m':>5} {'name':<20} {'median us':>10} {'min':>9} {'max':>9} {'GB/s':>6} {'GOPS':>6}"
                 f" {'of limit':>8} {'/ ' + OURS:>15}")  # fmt: skip
    ours = {(r["k"], r["n"], r["m"]): r["median_us"] for r in result["rows"] if r["name"] == OURS}
    for r in result["rows"]:
        base = ours.get((r["k"], r["n"], r["m"]))
        share = "" if r["of_limit"] is None else f"{r['of_limit']:.0%}"
        ratio = "" if base is None else f"{r['median_us'] / base:.2f}"
        lines.append(
            f"{r['k']:>6} x{r['n']:>5} {r['m']:>5} {r['name']:<20} {r['median_us']:>10.0f} {r['min_us']:>9.0f}"
            f" {r['max_us']:>9.0f} {r['gbs']:>6.1f} {r['gops']:>6.0f} {share:>8} {ratio:>15}"
        )
    lines += [f"{name} could not run: {reason}" for name, reason in result["refused"].items()]
    return "\n".join(lines)
