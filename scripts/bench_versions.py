"""Times the CPU's W4A8 kernels of a git revision beside those of the working tree, in turns, in one process.

    python scripts/bench_versions.py REVISION [--tokens 1 4 8 16 64] [--shapes 4096x4096] [--scales folded]
                                     [--threads 2] [--rounds 7] [--memory 600] [--json]

Every call multiplies other weights of `--memory` MB, so they come from memory, and takes what the call before gave as
its input where the shape is square, as a model's layers do. `ratio` is the working tree's median over the revision's.
Results must be the same bits. Both need a C compiler, and the same arguments of `qtk_linear`.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import io
import json
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtoolkit.kernels import build
from qtoolkit.kernels.cpu.backend import BASE_ROWS, PANEL, STEP, aligned
from qtoolkit.kernels.cpu.library import DTYPES, SCALES

ROOT = Path(__file__).resolve().parent.parent
KERNELS = Path("kernels/cpu")
GROUP = 128


@dataclass(frozen=True)
class Row:
    """Microseconds a call of one layer, by version: median, least and most of the rounds' means."""

    k: int
    n: int
    scales: str
    m: int
    revision_us: tuple[float, float, float]
    tree_us: tuple[float, float, float]

    @property
    def ratio(self) -> float:
        """Return the working tree's time over the revision's."""
        return self.tree_us[0] / self.revision_us[0]


@dataclass(frozen=True)
class Layers:
    """Layers of one shape and random weights: weights uint8 [copies, bytes], scales as a panel has them."""

    k: int
    n: int
    weights: Tensor
    scales: Tensor
    group_size: int

    @staticmethod
    def make(k: int, n: int, scales: str, memory: int) -> Layers:
        """Return as many layers as fit ``memory`` bytes, two at least; k and n multiples of 128 and 64."""
        panels, groups = n // PANEL, k // GROUP
        size = panels * (k // STEP) * PANEL * STEP // 2
        copies = max(2, memory // size)
        weights = aligned((copies + 1) * size)[: copies * size].view(copies, size)  # one more: prefetches run ahead
        weights.random_()
        small = 1 / (40.0 * k**0.5)  # keeps a chain of layers within bfloat16
        if scales == "folded":
            own = torch.randint(1, 17, (panels, BASE_ROWS + groups, PANEL), dtype=torch.uint8)
            own[:, :BASE_ROWS] = torch.full((panels, PANEL), small / 8).view(torch.uint8).view(panels, BASE_ROWS, PANEL)
        elif scales == "groups":
            own = torch.full((panels, groups, PANEL), small, dtype=torch.bfloat16)
        else:
            own = torch.full((panels, 1, PANEL), small)
        return Layers(k, n, weights, own, -1 if scales == "channel" else GROUP)

    def run(self, library: ctypes.CDLL, copy: int, x: Tensor, y: Tensor) -> None:
        """Compute ``y`` [m, n] from ``x`` [m, k], both bfloat16, with the weights ``copy``, on the best path."""
        library.qtk_linear(
            best(library), x.data_ptr(), self.k, DTYPES[x.dtype], 0, len(x), self.k, self.n, self.group_size,
            self.weights[copy].data_ptr(), self.scales.data_ptr(), SCALES[self.scales.dtype], None, 0, y.data_ptr(),
        )  # fmt: skip

    def timed(self, libraries: list[ctypes.CDLL], m: int, rounds: int) -> list[tuple[float, float, float]]:
        """Return each library's microseconds a call, after one round that does not count.

        Raises:
            RuntimeError: their results differ.
        """
        chained = self.k == self.n
        given = torch.randn(m, self.k).bfloat16()
        results = [torch.empty(m, self.n, dtype=torch.bfloat16) for _ in libraries]
        spent: list[list[float]] = [[] for _ in libraries]
        for round_ in range(rounds + 1):
            for which in random.sample(range(len(libraries)), len(libraries)):
                x, y = given.clone(), results[which]
                start = time.perf_counter()
                for copy in range(len(self.weights)):
                    self.run(libraries[which], copy, x, y)
                    if chained:
                        x, y = y, x
                if round_:
                    spent[which].append((time.perf_counter() - start) / len(self.weights) * 1e6)
        for library, y in zip(libraries, results, strict=True):
            self.run(library, 0, given, y)
        if any(not torch.equal(results[0].view(torch.int16), y.view(torch.int16)) for y in results):
            raise RuntimeError(f"results differ: {self.k}x{self.n}, {m} tokens")
        return [(statistics.median(own), min(own), max(own)) for own in spent]


def best(library: ctypes.CDLL) -> int:
    """Return the first path that this CPU has; asking is what lets a process use AMX."""
    number = 0
    while not library.qtk_path_supported(number):
        number += 1
    return number


def built(folder: Path) -> ctypes.CDLL:
    """Build and load the kernels in ``folder``, with the flags that its own library.py names."""
    spec = importlib.util.spec_from_file_location(f"library_of_{abs(hash(folder))}", folder / "library.py")
    assert spec is not None
    assert spec.loader is not None
    own: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = own
    spec.loader.exec_module(own)
    functions = own.opened(build.library("w4a8", own.units(), tuple(sorted(folder.glob("*.h"))), own.FLAGS))
    own.declare(functions)
    return functions


def extract(revision: str, folder: Path) -> Path:
    """Write the kernels of ``revision`` below ``folder`` and return where.

    Raises:
        SystemExit: git does not know it.
    """
    command = ["git", "-C", str(ROOT), "archive", revision, str(KERNELS)]
    archive = subprocess.run(command, capture_output=True, check=False)
    if archive.returncode:
        raise SystemExit(f"git cannot give {KERNELS} of {revision}: {archive.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    return folder / KERNELS


def rows(libraries: list[ctypes.CDLL], own: argparse.Namespace) -> Iterator[Row]:
    """Yield one row for each shape, kind of scales and number of tokens."""
    for shape in own.shapes:
        k, n = (int(part) for part in shape.split("x"))
        for scales in own.scales:
            layers = Layers.make(k, n, scales, own.memory << 20)
            for m in own.tokens:
                yield Row(k, n, scales, m, *layers.timed(libraries, m, own.rounds))


def main() -> None:
    """Parse the command line, build both, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 8, 16, 64])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096"], help="KxN, multiples of 128 and 64")
    parser.add_argument("--scales", nargs="+", default=["folded"], choices=["folded", "channel", "groups"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", type=int, default=600, help="MB of weights")
    parser.add_argument("--json", action="store_true")
    own = parser.parse_args()
    torch.set_num_threads(own.threads)
    with tempfile.TemporaryDirectory() as folder:
        libraries = [built(extract(own.revision, Path(folder))), built(ROOT / KERNELS)]
        if not own.json:
            print("| k x n | scales | tokens | revision, us | working tree, us | ratio |\n|---|---|---|---|---|---|")
        for row in rows(libraries, own):
            if own.json:
                print(json.dumps({**asdict(row), "ratio": row.ratio}), flush=True)
                continue
            before, after = (f"{us[0]:.0f} ({us[1]:.0f} to {us[2]:.0f})" for us in (row.revision_us, row.tree_us))
            print(f"| {row.k}x{row.n} | {row.scales} | {row.m} | {before} | {after} | {row.ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
