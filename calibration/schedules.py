"""How a pattern is brought in during training: which part of it is still dense at each moment."""

from __future__ import annotations

import math
from collections.abc import Callable

from qtoolkit.errors import RequestError
from qtoolkit.registry import suggest

BASE = 0.05  # of the exponential schedule

SCHEDULES: dict[str, Callable[[float], float]] = {
    "one-shot": lambda u: 0.0,
    "linear": lambda u: 1 - u,
    "cosine": lambda u: math.cos(math.pi * u / 2),
    "cubic": lambda u: (1 - u) ** 3,
    "exponential": lambda u: (BASE**u - BASE) / (1 - BASE),
}


def still_dense(schedule: str, progress: float, ramp: float) -> float:
    """Return the dense part, 1 at the start and 0 from the part ``ramp`` of the training on.

    Raises:
        RequestError: an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise RequestError(f"There is no schedule {schedule!r}.", suggest(schedule, SCHEDULES))
    u = min(progress / ramp, 1.0) if ramp > 0 else 1.0
    return max(SCHEDULES[schedule](u), 0.0) if u < 1 else 0.0
