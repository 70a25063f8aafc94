"""Lets another process measure, and goes on without the step that hangs or breaks the device, so one run says most.

A kernel that never returns, or one after which every call fails, would take what follows with it: figures of one run
come from one process as long as none does that. The process that watches never touches the device.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from qtoolkit.evals.gpu_bench.session import LOST, step_file, write

MOST = 8  # processes of a run
GRACE = 25.0  # seconds behind the deadline at which a step under way is ended
POLL = 0.2


def end_with_parent() -> None:
    """Let the kernel end this process when the one that started it ends; elsewhere than on Linux nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL


def supervise(command: Sequence[str], out: Path, until: float) -> None:
    """Run ``command``, which measures into ``out``, and again after each loss.

    Args:
        command: a process that goes on from what ``out`` holds and marks its steps, see ``session.Run``.
        out: the result's file; "lost" in it names what ended a process.
        until: ``time.monotonic`` after which nothing is started again, and GRACE later nothing is left to run.
    """
    for _ in range(MOST):
        step_file(out).unlink(missing_ok=True)  # the last process's
        child = subprocess.Popen(command)
        why = wait(child, out, until + GRACE)
        if why is None:
            break
        _, of, what = marked(out)
        note(out, what or "between two steps", of, why)
        print(f"{why}: {what or 'between two steps'}", flush=True)
        if not what or child.returncode is None or time.monotonic() > until:
            break
    step_file(out).unlink(missing_ok=True)


def marked(out: Path) -> tuple[float, str, str]:
    """Return patience in seconds, whose kernels, and name of the step under way; without one a long patience."""
    try:
        patience, of, what = step_file(out).read_text("utf-8").split("\n")[:3]
        return float(patience), of, what
    except (OSError, ValueError):  # none yet, or half written
        return 120.0, "", ""


def wait(child: subprocess.Popen[bytes], out: Path, end: float) -> str | None:
    """Wait for a process; return why it did not end by itself, or None if it did."""
    mark, since = marked(out), time.monotonic()
    while child.poll() is None:
        time.sleep(POLL)
        now = time.monotonic()
        if marked(out) != mark:
            mark, since = marked(out), now
        if now > min(end, since + mark[0]):
            child.kill()
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                return "the process cannot be ended: the driver holds it"
            return "a step did not return" if now <= end else "the time was over"
    if child.returncode == LOST:
        return "the device answered no more"
    return f"the process died ({child.returncode})" if child.returncode < 0 else None


def note(out: Path, what: str, of: str, why: str) -> None:
    """Write into a result what ended a process."""
    try:
        result = json.loads(out.read_text("utf-8"))
    except (OSError, ValueError):  # it had not come so far
        result = {"finished": False}
    result.setdefault("lost", []).append({"what": what, "of": of, "why": why})
    result.setdefault("could_not", []).append(f"{what}: {why}")
    write(out, result)
