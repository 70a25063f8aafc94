"""One run of the benchmark: what it has found so far, until when it may go on, and a file that survives a cut."""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtoolkit.evals.gpu_bench.clock import Clock

GRACE = 25.0  # seconds behind the deadline after which a call that never returns ends the process


@dataclass
class Run:
    """What a run has found so far, and until when it may look for more.

    Attributes:
        device: "cuda", or "cpu" to try the script.
        clock: times calls.
        until: ``time.monotonic`` at which nothing new starts.
        out: the JSON file, rewritten as the run goes; None keeps nothing.
        result: what the file will hold.
        could_not: what failed or was left out, in words.
    """

    device: str
    clock: Clock
    until: float
    out: Path | None = None
    result: dict[str, Any] = field(default_factory=dict)
    could_not: list[str] = field(default_factory=list)

    def late(self) -> bool:
        """Return whether nothing new may start."""
        return time.monotonic() > self.until

    def share(self, left: int) -> float:
        """Return the deadline of the next of ``left`` equal steps: half as much again as its share of the time."""
        now = time.monotonic()
        return min(self.until, now + max(15.0, 1.5 * (self.until - now) / max(left, 1)))

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

    def keep(self, finished: bool = False) -> None:
        """Write the result as it stands; whoever reads the file sees the last whole state."""
        if self.out is None:
            return
        text = json.dumps({**self.result, "could_not": self.could_not, "finished": finished}, indent=1)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self.out.parent, suffix=".part")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        os.replace(temporary, self.out)

    def guard(self, end: Callable[[int], object] = os._exit) -> threading.Timer:
        """Start what ends the process when a kernel never returns: it keeps the result and says where it was."""

        def cut() -> None:
            print(f"cut: a step did not return {GRACE:.0f} s after the deadline; kept: {self.out}", flush=True)
            self.could_not.append("the rest: a step did not return, the process was ended")
            for _ in range(5):
                try:
                    self.keep()
                    break
                except RuntimeError:  # the main thread was adding to the result
                    time.sleep(0.1)
            end(1)

        timer = threading.Timer(self.until + GRACE - time.monotonic(), cut)
        timer.daemon = True
        timer.start()
        return timer
