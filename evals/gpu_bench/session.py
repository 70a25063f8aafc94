"""One run of the benchmark: what it has found so far, until when it may go on, and files that survive a cut."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qtoolkit.evals.gpu_bench.clock import Clock

PATIENCE = 40.0  # seconds that a step may take; who compiles for longer says so
KEEP_EVERY = 5.0  # seconds between two versions of the result's file
LOST = 3  # exit status of a process whose device answers no more
ENOUGH = 3  # after so many losses with the same kernels the others of them are left out


def step_file(out: Path) -> Path:
    """Return the file beside a result that names the step under way: its patience in seconds, whose, and what."""
    return out.with_suffix(".step")


@dataclass
class Run:
    """What a run has found so far, and until when it may look for more.

    Attributes:
        device: "cuda", or "cpu" to try the script.
        clock: times calls.
        until: ``time.monotonic`` at which nothing new starts.
        out: the JSON file, rewritten as the run goes; None keeps nothing.
        result: what the file will hold; "lost" are the steps that ended a process before this one, see ``watch``.
        could_not: what failed or was left out, in words.
    """

    device: str
    clock: Clock
    until: float
    out: Path | None = None
    result: dict[str, Any] = field(default_factory=dict)
    could_not: list[str] = field(default_factory=list)
    kept: float = 0.0

    def late(self) -> bool:
        """Return whether nothing new may start."""
        return time.monotonic() > self.until

    def share(self, left: int, reserve: float = 0.0) -> float:
        """Return the deadline of the next of ``left`` equal steps: half as much again as its share of the time.

        ``reserve``: seconds that what comes after all of them needs.
        """
        now, end = time.monotonic(), self.until - reserve
        return min(end, now + max(15.0, 1.5 * (end - now) / max(left, 1)))

    def avoided(self, what: str, of: str) -> bool:
        """Return whether a step has ended a process before, or kernels of the same kind have often enough."""
        lost = self.result.get("lost", [])
        return any(step["what"] == what for step in lost) or sum(bool(of) and s["of"] == of for s in lost) >= ENOUGH

    def attempt(self, what: str, step: Callable[[], Any], of: str = "", patience: float = PATIENCE) -> Any:
        """Run ``step``; a failure or a lack of time is noted and printed at the end, and the run goes on.

        Args:
            what: the step in words; ``of``: whose kernels it runs, such as "cuda".
            step: is called once; it must not leave work on the device.
            patience: seconds after which the process that watches takes the step for one that never returns.

        Raises:
            SystemExit: the device answers no more (an illegal address, say), so that nothing else can be measured in
                this process; what there is has been kept.
        """
        if self.late():
            self.could_not.append(f"{what}: out of time")
            return None
        if self.avoided(what, of):
            self.could_not.append(f"{what}: left out, for what happened before")
            return None
        self.mark(what, of, patience)
        try:
            found = step()
        except Exception as error:  # one contender must not end the run; the reason is reported
            words = str(error).strip().splitlines() or [""]
            self.could_not.append(f"{what}: {type(error).__name__}: {words[0][:200]}")
            if not self.answers():
                self.keep()
                raise SystemExit(LOST) from error
            found = None
        self.mark("", "", patience)
        if time.monotonic() > self.kept + KEEP_EVERY:
            self.keep()
        return found

    def answers(self) -> bool:
        """Return whether the device still works: after some errors every call fails until the process ends."""
        if self.device == "cuda":
            import torch

            try:
                torch.cuda.synchronize()
            except RuntimeError:
                return False
        return True

    def mark(self, what: str, of: str, patience: float) -> None:
        """Leave word of the step that begins, for the process that watches."""
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            step_file(self.out).write_text(f"{patience}\n{of}\n{what}\n", "utf-8")

    def keep(self, finished: bool = False) -> None:
        """Write the result as it stands; whoever reads the file sees the last whole state."""
        self.kept = time.monotonic()
        if self.out is not None:
            write(self.out, {**self.result, "could_not": self.could_not, "finished": finished})


def write(out: Path, result: dict[str, Any]) -> None:
    """Write a result, whole or not at all."""
    text = json.dumps(result, indent=1)
    out.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=out.parent, suffix=".part")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text + "\n")
    os.replace(temporary, out)
