"""The loop of a benchmark worker: makes layers and times them on request, in a Python of its own, without qtoolkit.

One JSON object a line on standard input is answered by one on standard output:

    {}                                                  -> {"name": {"bits": 4.5, "integer": true}, ...}
    {"make": "name", "k": 4096, "n": 4096, "copies": 3} -> {"ok": true}
    {"run": "name", "m": 16}                            -> {"seconds": [0.00051, 0.0005]}

``copies`` layers take turns, so that weights come from memory.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import cycle
from typing import NamedTuple

Layer = Callable[[int], None]  # multiplies m tokens
QUIET = 0.04  # seconds: threads of whoever ran before have stopped spinning by then (GNU OpenMP: after 5 to 15 ms)
WARM = 0.01  # seconds that are not timed: calls after a pause take up to twice as long at first, 1.2 times for 5 ms
TIMED = 0.005  # seconds of timed calls


def warm(call: Callable[[], object]) -> None:
    """Call once, and until threads and caches are awake."""
    end = time.perf_counter() + WARM
    call()
    while time.perf_counter() < end:
        call()


def timed(call: Callable[[], object]) -> list[float]:
    """Warm up and return the seconds of each of the next calls, one or as many as ``TIMED`` holds."""
    warm(call)
    seconds: list[float] = []
    while sum(seconds) < TIMED:
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return seconds


class Kind(NamedTuple):
    """One kind of layer: bits a weight value takes, whether activations are int8, and ``make(k, n)``."""

    bits: float
    integer: bool
    make: Callable[[int, int], Layer]


def _next(turn: Iterator[Layer], m: int) -> None:
    next(turn)(m)


def serve(kinds: Mapping[str, Kind]) -> None:
    """Answer until standard input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not mix with answers
    layers: dict[str, cycle[Layer]] = {}
    for line in sys.stdin:
        order = json.loads(line)
        if "make" in order:
            name = order["make"]
            layers.pop(name, None)
            layers[name] = cycle([kinds[name].make(order["k"], order["n"]) for _ in range(order["copies"])])
            answer: dict[str, object] = {"ok": True}
        elif "run" in order:
            turn = layers[order["run"]]
            time.sleep(QUIET)
            answer = {"seconds": timed(partial(_next, turn, order["m"]))}
            time.sleep(QUIET)
        else:
            answer = {name: {"bits": kind.bits, "integer": kind.integer} for name, kind in kinds.items()}
        print(json.dumps(answer), file=answers, flush=True)
