"""Freed memory goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qtoolkit import memory

CODE = """
import sys, torch
from qtoolkit import memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
if sys.argv[1] == "keep": memory.keep_little()
for _ in range(2):  # glibc learns from the first that pieces of this size are freed
    held = [torch.ones(6 << 20, dtype=torch.uint8) for _ in range(40)]
    last = torch.ones(6 << 20, dtype=torch.uint8)
    before = resident()
    del held
if sys.argv[1] == "trim": memory.trim()
print((before - resident()) >> 20)
"""


@pytest.mark.skipif(memory._glibc() is None, reason="the C library is not glibc")
@pytest.mark.parametrize("way", ["keep", "trim"])
def test_freed_memory_goes_back(way: str) -> None:
    out = subprocess.run([sys.executable, "-c", CODE, way], capture_output=True, text=True, check=True).stdout
    assert int(out) > 200  # of 240 MB
