"""Chains of butterfly factors: the published ones by layer shape, and a search for any other shape.

The published generator knows three shapes of 3x3 layers and makes invalid factors on its bulging branch (it truncates
2730.67 to 2730). The search here enumerates: r and s such that s divides what is left of the channels and the product
is dense, the fewest numbers first among those within the wanted compression.
"""

from __future__ import annotations

from functools import cache

from qtoolkit.vision import butterfly
from qtoolkit.vision.butterfly import Chain

# (outputs, inputs) -> grids r x s x t from the input's side on; DeBut (Lin et al. 2021), appendix
PUBLISHED = {
    (16, 72): "4x3x1 2x2x4 1x2x8 2x6x8",
    (128, 400): "16x25x1 2x2x16 1x2x32 2x2x32 2x2x64",
    (64, 128): "2x4x1 2x2x2 2x2x4 2x2x8 2x2x16 2x2x32",
    (512, 4608): "8x9x1 2x2x8 2x2x16 2x2x32 2x4x64 2x4x128 2x4x256",
    (512, 2304): "8x9x1 2x2x8 2x2x16 2x2x32 2x4x64 2x4x128 2x2x256",
}
LARGEST = 64  # r and s of a factor


def published(n: int, k: int) -> Chain | None:
    """Return the published chain of a layer's matrix [n, k], if there is one."""
    text = PUBLISHED.get((n, k))
    return butterfly.parse(text, k) if text else None


def search(n: int, k: int, compression: float, factors: int = 6, bulge: float = 2.0) -> Chain | None:
    """Return the chain that saves at least ``compression`` of n * k numbers and stores the most of those.

    Args:
        n: outputs.
        k: inputs.
        compression: wanted LC, such as 0.8.
        factors: at most so many.
        bulge: an inner width may be up to so many times the larger of n and k; 1 makes chains monotonic.

    Returns:
        The chain with the largest number of nonzeros within the budget (the most capacity), the one with fewer
        factors among equals; None when no chain saves that much.
    """
    budget = int(n * k * (1 - compression))
    widest = int(max(n, k) * bulge)

    @cache
    def best(width: int, t: int, left: int, room: int) -> tuple[int, tuple[tuple[int, int, int], ...]] | None:
        """Return (nonzeros, grids) of the best way from ``width`` channels with block size t to n outputs."""
        found: tuple[int, tuple[tuple[int, int, int], ...]] | None = None
        for s in _divisors(width):
            if s > LARGEST or width % (s * t):
                continue
            for r in _divisors(n // t if n % t == 0 else 0):
                if r > LARGEST or r * s == 1:
                    continue
                p = width * r // s
                cost = p * s
                if p > widest or cost > room or p % (r * t):
                    continue
                if p == n and r * t == n:
                    candidate: tuple[int, tuple[tuple[int, int, int], ...]] | None = (cost, ((r, s, t),))
                elif left > 1 and n % (r * t) == 0:
                    rest = best(p, r * t, left - 1, room - cost)
                    candidate = (cost + rest[0], ((r, s, t), *rest[1])) if rest else None
                else:
                    candidate = None
                if candidate and (found is None or (candidate[0], -len(candidate[1])) > (found[0], -len(found[1]))):
                    found = candidate
        return found

    chosen = best(k, 1, factors, budget)
    return butterfly.chain(k, chosen[1]) if chosen else None


@cache
def _divisors(number: int) -> tuple[int, ...]:
    return tuple(d for d in range(1, number + 1) if number % d == 0)
