"""Builds the CUDA kernels for a CPU (see cuda_emulation.hpp) and launches them with the driver's signature."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from qtoolkit.kernels.cuda import backend, driver
from qtoolkit.kernels.cuda.source import Kernel

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
FLAGS = ("-O1", "-std=c++17", "-shared", "-fPIC", "-w", "-fno-gnu-unique")


class Emulator:
    """Launches kernels on the CPU; ``tensors`` are the memory that bulk copies may read, ``seed`` orders the copies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seed = 0
        self.tensors: list[Tensor] = []
        self.everything_readable = False

    def place(self, multiprocessors: int = 2, everything_readable: bool = False) -> backend.Place:
        """Return a place whose launches come here; few multiprocessors make a block walk over several tiles."""
        self.everything_readable = everything_readable
        return backend.Place("emulated", multiprocessors, 0, self.load)

    def load(self, kernel: Kernel) -> driver.Launch:
        emulation = (HERE / "cuda_emulation.hpp").read_text()
        common = self.folder / "common.hpp"  # the standard headers, read once: half of a variant's compile time
        if not common.exists():
            common.write_text("".join(line + "\n" for line in emulation.splitlines() if line.startswith("#include")))
            subprocess.run([COMPILER, *FLAGS, "-x", "c++-header", "-o", f"{common}.gch", str(common)], check=True)
        text = kernel.text(emulation) + (HERE / "cuda_emulation_entry.hpp").read_text()
        library = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
        if not library.exists():
            source = library.with_suffix(".cpp")
            source.write_text(text)
            subprocess.run([COMPILER, *FLAGS, "-include", str(common), "-o", str(library), str(source)], check=True)
        emulate = ctypes.CDLL(str(library)).emulate
        emulate.restype = ctypes.c_char_p

        def launch(grid: int, cluster: int, arguments: Sequence[object], stream: int, early: bool) -> None:
            ranges = [(t.data_ptr(), t.numel() * t.element_size()) for t in self.tensors]
            if self.everything_readable:
                ranges = [(0, 2**62)]
            pointers = (ctypes.c_void_p * len(ranges))(*(start for start, _ in ranges))
            sizes = (ctypes.c_long * len(ranges))(*(size for _, size in ranges))
            shape = (grid, cluster, kernel.threads, kernel.shared_bytes, self.seed)
            problem = emulate(*shape, pointers, sizes, len(ranges), driver.pointers_to(arguments))
            if problem:
                raise RuntimeError(f"emulated {kernel.entry}: {problem.decode()}")

        return launch
