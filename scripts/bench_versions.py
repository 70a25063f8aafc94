"""Times the CPU's W4A8 kernels of a git revision beside those of the working tree, in turns, in one process.

    python scripts/bench_versions.py REVISION [--tokens 1 4 8 16 64] [--shapes 4096x4096] [--scales folded]
                                     [--threads 2] [--rounds 7] [--memory 600] [--json]

Every call multiplies other weights of `--memory` MB, which should be more than the caches hold, and takes what the call
before gave as its input where the shape is square, as a model's layers do. `ratio` is the working tree's median over
the revision's. Results must be the same bits. Both need a C compiler, and the same arguments of `qtk_linear`.
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
RESTART = 16  # layers of a chain: its numbers neither vanish nor overflow in so few


@dataclass(frozen=True)
class Kernels:
    """One version's library, and the number of the best path that this CPU has."""

    library: ctypes.CDLL
    path: int


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
    """Layers of one shape: random weights uint8 [copies, bytes], scales [copies, ...] as panels have them."""

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
        small = 1 / (5.0 * k**0.5)  # codes deviate by 4.6: results are as large as inputs
        if scales == "folded":
            own = torch.randint(1, 17, (panels, BASE_ROWS + groups, PANEL), dtype=torch.uint8)
            own[:, :BASE_ROWS] = torch.full((panels, PANEL), small / 8).view(torch.uint8).view(panels, BASE_ROWS, PANEL)
        elif scales == "groups":
            own = torch.full((panels, groups, PANEL), small, dtype=torch.bfloat16)
        else:
            own = torch.full((panels, 1, PANEL), small)
        own = own.expand(copies, *own.shape).contiguous()
        return Layers(k, n, weights, own, -1 if scales == "channel" else GROUP)

    def run(self, kernels: Kernels, copy: int, x: Tensor, y: Tensor) -> None:
        """Compute ``y`` [m, n] from ``x`` [m, k], both bfloat16, with the weights ``copy``."""
        kernels.library.qtk_linear(
            kernels.path, x.data_ptr(), self.k, DTYPES[x.dtype], 0, len(x), self.k, self.n, self.group_size,
            self.weights[copy].data_ptr(), self.scales[copy].data_ptr(), SCALES[self.scales.dtype], None, 0,
            y.data_ptr(),
        )  # fmt: skip

    def timed(self, versions: list[Kernels], m: int, rounds: int) -> list[tuple[float, float, float]]:
        """Return each version's microseconds a call, after one round that does not count.

        Raises:
            SystemExit: their results differ.
        """
        chained = self.k == self.n
        given = torch.randn(m, self.k).bfloat16()
        results = [torch.empty(m, self.n, dtype=torch.bfloat16) for _ in versions]
        spent: list[list[float]] = [[] for _ in versions]
        for round_ in range(rounds + 1):
            for which in random.sample(range(len(versions)), len(versions)):
                first, second = given.clone(), results[which]
                start = time.perf_counter()
                for copy in range(len(self.weights)):
                    back = chained and copy % 2
                    if chained and copy % RESTART == 0:
                        first.copy_(given)
                    self.run(versions[which], copy, *((second, first) if back else (first, second)))
                if round_:
                    spent[which].append((time.perf_counter() - start) / len(self.weights) * 1e6)
        for kernels, y in zip(versions, results, strict=True):
            self.run(kernels, 0, given, y)
        if any(not torch.equal(results[0].view(torch.int16), y.view(torch.int16)) for y in results):
            raise SystemExit(f"the two versions' results differ: {self.k}x{self.n}, {m} tokens")
        return [(statistics.median(own), min(own), max(own)) for own in spent]


def best(library: ctypes.CDLL) -> int:
    """Return the first path that this CPU has; asking is what lets a process use AMX."""
    number = 0
    while not library.qtk_path_supported(number):
        number += 1
    return number


def built(folder: Path) -> Kernels:
    """Build and load the kernels in ``folder``, with the flags that its own library.py names.

    Raises:
        SystemExit: they cannot be built.
    """
    spec = importlib.util.spec_from_file_location(f"library_of_{abs(hash(folder))}", folder / "library.py")
    assert spec is not None
    assert spec.loader is not None
    own: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = own
    spec.loader.exec_module(own)
    try:
        functions = own.opened(build.library("w4a8", own.units(), tuple(sorted(folder.glob("*.h"))), own.FLAGS))
    except build.BuildError as error:
        raise SystemExit(f"the kernels of {folder} cannot be built: {error}") from error
    own.declare(functions)
    return Kernels(functions, best(functions))


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


def rows(versions: list[Kernels], own: argparse.Namespace) -> Iterator[Row]:
    """Yield one row for each shape, kind of scales and number of tokens."""
    for k, n in own.shapes:
        for scales in own.scales:
            layers = Layers.make(k, n, scales, own.memory << 20)
            for m in own.tokens:
                yield Row(k, n, scales, m, *layers.timed(versions, m, own.rounds))


def positive(text: str) -> int:
    """Return a whole number that is not below 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 on")
    return int(text)


def shape(text: str) -> tuple[int, int]:
    """Return the k and n of KxN."""
    k, _, n = text.partition("x")
    if not (k.isdecimal() and n.isdecimal() and int(k) and int(n)) or int(k) % GROUP or int(n) % PANEL:
        raise argparse.ArgumentTypeError(f"{text} is not KxN with K a multiple of {GROUP} and N of {PANEL}")
    return int(k), int(n)


def main() -> None:
    """Parse the command line, build both, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision")
    parser.add_argument("--tokens", type=positive, nargs="+", default=[1, 4, 8, 16, 64])
    parser.add_argument("--shapes", type=shape, nargs="+", default=[(4096, 4096)], help="KxN, multiples of 128 and 64")
    parser.add_argument("--scales", nargs="+", default=["folded"], choices=["folded", "channel", "groups"])
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--memory", type=positive, default=600, help="MB of weights")
    parser.add_argument("--json", action="store_true")
    own = parser.parse_args()
    torch.set_num_threads(own.threads)
    with tempfile.TemporaryDirectory() as folder:
        versions = [built(extract(own.revision, Path(folder))), built(ROOT / KERNELS)]
        if not own.json:
            print("| k x n | scales | tokens | revision, us | working tree, us | ratio |\n|---|---|---|---|---|---|")
        for row in rows(versions, own):
            if own.json:
                print(json.dumps({**asdict(row), "ratio": row.ratio}), flush=True)
                continue
            before, after = (f"{us[0]:.0f} ({us[1]:.0f} to {us[2]:.0f})" for us in (row.revision_us, row.tree_us))
            print(f"| {row.k}x{row.n} | {row.scales} | {row.m} | {before} | {after} | {row.ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
