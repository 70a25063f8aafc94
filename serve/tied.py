"""Becomes another program that ends when its parent does: python tied.py PARENT_PID PROGRAM ARGUMENTS...

A program of its own instead of code between fork and exec: it is safe in a process with threads, and a large process
need not be copied to start a small one.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(stop: signal.Signals) -> None:
    """Ask the kernel to send ``stop`` to this process when the thread that started it ends; on Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(stop))


if __name__ == "__main__":
    die_with_parent(signal.SIGTERM)  # survives the exec below
    if os.getppid() != int(sys.argv[1]):  # the parent died before we could ask
        sys.exit(1)
    os.execv(sys.argv[2], sys.argv[2:])
