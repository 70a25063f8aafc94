"""Times calls cold (nothing of the last call left in the second-level cache) on a GPU, or plainly on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Protocol

import torch

Call = Callable[[], object]


class Clock(Protocol):
    """Microseconds of a call; ``behind`` says of how many of the last ones the host's time is a part."""

    behind: int

    def times(self, call: Call, repeats: int) -> list[float]:
        """Return the microseconds of ``repeats`` calls, after two that do not count."""
        ...


class GpuClock:
    """Device events around each call; before it, a buffer larger than any cache is overwritten, twice.

    The overwriting takes about 200 microseconds of device time, in which the host runs ahead: what a call spends in
    Python is not measured, as under a CUDA graph. ``behind`` counts the calls of the last measurement for which that
    was not so: the device had started them before the host had said all.
    """

    def __init__(self, flush_bytes: int = 256 << 20) -> None:
        self.flush = torch.empty(flush_bytes // 4, dtype=torch.int32, device="cuda")
        self.behind = 0

    def times(self, call: Call, repeats: int) -> list[float]:
        """Return the device's microseconds of each call."""
        for _ in range(2):
            call()
        torch.cuda.synchronize()
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        self.behind = 0
        for start, end in pairs:
            self.flush.zero_()
            self.flush.fill_(1)
            start.record()
            call()
            self.behind += start.query()
            end.record()
        torch.cuda.synchronize()
        return [1000 * start.elapsed_time(end) for start, end in pairs]


class CpuClock:
    """The host's clock, for trying the script where there is no GPU."""

    behind = 0

    def times(self, call: Call, repeats: int) -> list[float]:
        """Return the host's microseconds of each call."""
        call()
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            found.append(1e6 * (time.perf_counter() - start))
        return found


def summary(times: list[float]) -> dict[str, float]:
    """Return median and the middle half's bounds, in microseconds."""
    ordered = sorted(times)
    quarter = len(ordered) // 4
    return {
        "median": round(median(ordered), 2),
        "low": round(ordered[quarter], 2),
        "high": round(ordered[-1 - quarter], 2),
    }


def graph_series(calls: list[Call], replays: int = 20) -> float:
    """Return the microseconds of one call inside a CUDA graph of all ``calls`` (layers with their own weights, say)."""
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()  # the layers are there before another stream reads them
    with torch.cuda.stream(stream):  # a warm-up outside capture loads modules and compiles
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return 1000 * start.elapsed_time(end) / replays / len(calls)
