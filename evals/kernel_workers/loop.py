"""The loop of a benchmark worker: makes layers and times them on request, in a Python of its own, without qtoolkit.

One JSON object a line on standard input is answered by one on standard output:

    {}                                                  -> {"name": {"bits": 4.5, "integer": true}, ...}
    {"make": "name", "k": 4096, "n": 4096, "copies": 3} -> {"ok": true}
    {"run": "name", "m": 16}                            -> {"seconds": 0.00051}

Each run is preceded by one that is not timed. ``copies`` layers take turns, so that weights come from memory.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from itertools import cycle
from typing import NamedTuple

Layer = Callable[[int], None]  # multiplies m tokens
QUIET = 0.04  # seconds: most threads of whoever ran before have stopped spinning by then, not all (evals/LOG.md)


class Kind(NamedTuple):
    """One kind of layer: bits a weight value takes, whether activations are int8, and ``make(k, n)``."""

    bits: float
    integer: bool
    make: Callable[[int, int], Layer]


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
            next(turn)(order["m"])
            layer = next(turn)
            begun = time.perf_counter()
            layer(order["m"])
            answer = {"seconds": time.perf_counter() - begun}
            time.sleep(QUIET)
        else:
            answer = {name: {"bits": kind.bits, "integer": kind.integer} for name, kind in kinds.items()}
        print(json.dumps(answer), file=answers, flush=True)
