"""Freed memory goes back to the system, where it may be wanted for something else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from qtoolkit import memory

CODE = """
import sys, torch
from qtoolkit import memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
memory.keep_little()
for _ in range(2):
    size = 40 if sys.argv[1] == "keep" else 6  # MB
    held = [torch.ones(size << 20, dtype=torch.uint8) for _ in range(240 // size)]
    last = torch.ones(6 << 20, dtype=torch.uint8)
    more = torch.ones((300 << 20) if sys.argv[1] == "far" else 1, dtype=torch.uint8)
    before = resident()
    del held
del more
if sys.argv[1] in ("trim", "far"):
    held = torch.ones(240 << 20, dtype=torch.uint8) if sys.argv[1] == "trim" else None
    before = resident()
    memory.trim()
print((before - resident()) >> 20)
"""


@pytest.mark.skipif(memory._glibc() is None, reason="the C library is not glibc")
@pytest.mark.parametrize(("way", "least", "most"), [("keep", 200, 250), ("trim", 200, 500), ("far", -1, 1)])
def test_freed_memory_goes_back(way: str, least: int, most: int) -> None:
    """All that was large, 240 MB; of smaller pieces so many and more if a peak is near, nothing where one is far."""
    out = subprocess.run([sys.executable, "-c", CODE, way], capture_output=True, text=True, check=True).stdout
    assert least <= int(out) <= most


COMMAND = """
import os, sys
from qtoolkit import memory
from qtoolkit.cli import app, quantize
real = memory.keep_little
memory.keep_little = lambda: print("torch" in sys.modules, real(), os.environ.get(memory.BUFFERS))
app(["quantize", "tiny", "--dry-run"])
"""


@pytest.mark.skipif(memory._glibc() is None, reason="the C library is not glibc")
def test_libraries_are_told_before_they_are_loaded() -> None:
    environment = {name: value for name, value in os.environ.items() if name != memory.BUFFERS}
    run = subprocess.run([sys.executable, "-c", COMMAND], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.splitlines()[0] == "False None 1"
