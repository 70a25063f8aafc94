"""Whether a compressed vision layer runs on a kernel here or as dense torch, and in words why not.

The rule is a table, not a trial at load: the same checkpoint takes the same way on every machine with the same
instruction set. Medians of a quiet machine (``evals/LOG.md``), some cells interpolated; measure with
``qtoolkit bench vision-kernels``.
"""

from __future__ import annotations

from dataclasses import dataclass

# Largest part of the weights that may be left for sums over the rest to beat dense torch, by code path and by outputs
# that share columns. One output a group (N:M) loads an input for every product and so gains least.
MOST_LEFT = {
    "avx512": {4: 0.65, 3: 0.55, 2: 0.55, 1: 0.4},
    "avx2": {4: 0.35, 3: 0.25, 2: 0.25, 1: 0.25},
}
LONG, MOST_LEFT_LONG = 768, 0.55  # N:M on AVX512: from this many inputs on an output, more may be left
FEWEST_CHANNELS = 16  # binary words hold 32 channels of a place; with fewer, most of each is padding
BINARY_PATHS = ("avx512", "avx2")


@dataclass(frozen=True)
class VisionProblem:
    """One layer as a kernel sees it: kind, input channels, outputs that share columns, weights left, places of it."""

    kind: str  # "binary", "nm" or "block"
    channels: int
    rows: int = 1
    left: float = 1.0  # stored values over the weights of the dense layer
    taps: int = 1  # places of the kernel


def refuse(problem: VisionProblem) -> str | None:
    """Return why ``problem`` runs as dense torch here, or None; the first call may compile the library."""
    from qtoolkit.kernels.cpu.vision import library

    if reason := library.failure():
        return reason
    return slower(problem, library.load().path)


def slower(problem: VisionProblem, path: str) -> str | None:
    """Return why the kernels of ``path`` would lose against dense torch, or None."""
    if problem.kind == "binary":
        if path not in BINARY_PATHS:
            return f"counting bits on the {path} path is no faster than float products"
        if problem.channels < FEWEST_CHANNELS:
            return f"{problem.channels} input channels fill too little of a word of 32"
        return None
    most = MOST_LEFT.get(path, {}).get(problem.rows, 0.0)
    if path == "avx512" and problem.rows == 1 and problem.channels * problem.taps >= LONG:
        most = MOST_LEFT_LONG
    if problem.left > most:
        return (
            f"{problem.left:.0%} of the weights are left; the {path} path is faster than dense torch up to {most:.0%}"
        )
    return None
