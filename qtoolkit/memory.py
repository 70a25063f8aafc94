"""Memory that was freed goes back to the system: glibc keeps it otherwise, in case it is wanted again.

What goes back is asked for again, page by page, unless pages are large: PyTorch takes large ones where it is told to.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

LARGE = 32 << 20  # bytes from which a tensor has pages of its own, which go back as soon as it is freed: glibc's most
PAGES = "THP_MEM_ALLOC_ENABLE"  # PyTorch's variable, read at its first large tensor: 2 MB pages for those
BUFFERS = "MKL_DISABLE_FAST_MM"  # MKL's, read when PyTorch is imported: else it keeps what each thread packed
KEPT = 64 << 20  # bytes that smaller ones may leave free at the heap's end: the system takes long to clear new pages
# Of the most memory this process has held: below, nothing is gained by giving back what soon is wanted again.
NEAR = 0.95
THRESHOLD, END = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of <malloc.h>; once one is set, glibc raises neither


def keep_little() -> None:
    """Ask the C library to give back large pieces at once and to keep few small ones, and PyTorch for large pages.

    Before PyTorch is imported it also asks MKL to free what it packs. Nothing without glibc.
    """
    library = _glibc()
    if library is not None:
        os.environ.setdefault(PAGES, "1")
        if "torch" not in sys.modules:
            os.environ.setdefault(BUFFERS, "1")
        library.mallopt(THRESHOLD, LARGE)
        library.mallopt(END, KEPT)


def trim() -> None:
    """Give back whatever is free now if a new peak is near; without glibc it goes back when the C library likes."""
    library = _glibc()
    if library is not None and _near_peak():
        library.malloc_trim(0)


def _near_peak() -> bool:
    try:
        with open("/proc/self/status") as status:
            held = {line[:5]: int(line.split()[1]) for line in status if line.startswith(("VmHWM", "VmRSS"))}
        return held["VmRSS"] >= NEAR * held["VmHWM"]
    except (OSError, KeyError):  # nothing is known
        return True


@cache
def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None
