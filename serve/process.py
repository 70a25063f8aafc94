"""Children that cannot outlive their parent: process groups, parent-death signals, and a stop that always ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress

from qtoolkit.serve import tied

OWNED = "QTOOLKIT_SERVE_OWNED"  # environment variable: this engine was started by our launcher
GRACE = 8.0  # seconds an engine gets to stop in order


def die_with_engine() -> None:
    """Tie this process to the engine process that started it, if our launcher owns the engine.

    The launcher ties the server to itself; workers are the server's children, and a killed server cannot stop them.
    """
    if os.environ.get(OWNED) and multiprocessing.parent_process() is not None:
        tied.die_with_parent(signal.SIGKILL)


def start(command: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start a server in a process group of its own, its output in one pipe; it gets SIGTERM if we die."""
    return subprocess.Popen(
        [sys.executable, "-S", tied.__file__, str(os.getpid()), *command],
        env={**env, OWNED: "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def stop(child: subprocess.Popen[str], grace: float = GRACE) -> None:
    """Stop a server that ``start`` made and everything below it; returns when nothing of it runs any more."""
    if child.poll() is None:
        child.terminate()
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C does not wait
            child.wait(grace)
    kill_group(child.pid)
    child.wait()


def kill_group(leader: int) -> None:
    """Kill what is left of the process group that ``leader`` led."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return  # nobody is left
