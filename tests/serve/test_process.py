"""Children are stopped with everything below them, also when they refuse and when we are killed ourselves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from qtoolkit.serve import process

LEAVES = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {LEAVES!r}])"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {PARENT}"


def started(script: str) -> tuple[subprocess.Popen[str], int]:
    """Start a script that starts another; return it and the other's process id."""
    child = process.start([sys.executable, "-c", script], os.environ)
    assert child.stdout is not None
    return child, int(child.stdout.readline())


def is_gone(pid: int, seconds: float = 10) -> bool:
    """Say whether a process ends (a zombie has ended) before ``seconds`` are over."""
    late = time.monotonic() + seconds
    while time.monotonic() < late:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("script", [PARENT, STUBBORN], ids=["obedient", "stubborn"])
def test_stop_ends_the_child_and_what_it_started(script: str) -> None:
    child, below = started(script)
    process.stop(child, grace=0.5)
    assert child.returncode is not None
    assert is_gone(below)


def test_stopping_twice_is_fine() -> None:
    child, _ = started(PARENT)
    process.stop(child, grace=0.5)
    process.stop(child, grace=0.5)
    assert child.poll() is not None


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals are Linux's")
def test_a_killed_launcher_takes_its_server_along() -> None:
    launcher = (
        "import os, sys, time; from qtoolkit.serve import process\n"
        f"child = process.start([sys.executable, '-c', {LEAVES!r}], os.environ)\n"
        "print(child.stdout.readline(), end='', flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    server = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert is_gone(server)
