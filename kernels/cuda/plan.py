"""Chooses how a linear is cut into tiles: from this card's measured table if one is shipped, else by a cost model."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from qtoolkit.kernels.cuda.layout import K_BLOCK, padded
from qtoolkit.kernels.cuda.source import Tiling, stage_bytes

TABLES = Path(__file__).parent.parent / "tuning"
# A thread holds blocks * tokens / 2 sums, with groups tokens / 2 more; small tiles leave room for two blocks at once.
SHAPES = tuple(
    [Tiling(tokens, 1, 1, 2) for tokens in (8, 16, 32, 48, 64)]
    + [Tiling(tokens, 1, 1, 1) for tokens in (96, 128, 256)]
    + [Tiling(tokens, 2, 1, 1) for tokens in (64, 96, 128)]
)
SPLITS = (1, 2, 4, 8)  # 8 is the largest portable cluster
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 512, 1024, 4096)

# The cost model counts cycles at 1.755 GHz. These are the H100's figures, per multiprocessor or for the whole card;
# the fixed costs are estimates that a measured table replaces.
PRODUCTS_PER_CYCLE = 4096  # int8 multiply-adds of a multiprocessor
MEMORY_BYTES_PER_CYCLE = 1700  # 3.0 TB/s, what a copy reaches
CACHE_BYTES_PER_CYCLE = 3000  # L2 to all multiprocessors
BLOCK_CYCLES = 2500  # a block's start: first copies arrive
K_BLOCK_CYCLES = 60  # waits and barriers of a k-block
FINISH_CYCLES = 1500  # scale and store
MEETING_CYCLES = 1500  # sum over a cluster


def candidates(tokens: int, n: int, k: int, grouped: bool) -> list[Tiling]:
    """Return every tiling that the kernel supports for this size and that is not plainly wasteful."""
    k_blocks = padded(k) // K_BLOCK
    found = []
    for shape in SHAPES:
        if shape.tokens >= 2 * max(tokens, 8) or padded(n) % (128 * shape.blocks) or (grouped and shape.tokens == 256):
            continue  # mostly empty; rows in whole tiles; a group's sums of 256 tokens do not fit into registers
        found += [replace(shape, split=split) for split in SPLITS if split <= k_blocks]
    return found


def cost(tiling: Tiling, tokens: int, n: int, k: int, grouped: bool, multiprocessors: int) -> float:
    """Estimate a launch's cycles: the largest of arithmetic, L2 and memory traffic, plus what nothing hides."""
    rows, k_blocks = 128 * tiling.blocks, padded(k) // K_BLOCK
    blocks = (padded(n) // rows) * -(-tokens // tiling.tokens) * tiling.split
    rounds = -(-blocks // multiprocessors)  # blocks that the busiest multiprocessor works on
    steps = -(-k_blocks // tiling.split)
    product = rows * tiling.tokens * K_BLOCK / PRODUCTS_PER_CYCLE * (1.2 if grouped else 1.0)
    fixed = FINISH_CYCLES * tiling.tokens / 128 + (MEETING_CYCLES if tiling.split > 1 else 0)
    arithmetic = rounds * (steps * (product + K_BLOCK_CYCLES) + fixed / tiling.resident)
    cache = blocks * steps * stage_bytes(tiling.tokens, tiling.blocks, grouped) / CACHE_BYTES_PER_CYCLE
    used = min(1.0, blocks / multiprocessors)
    memory = (n * k / 2 + tokens * (k + 2 * n)) / (MEMORY_BYTES_PER_CYCLE * min(1.0, 1.2 * used))
    waves = -(-blocks // (multiprocessors * tiling.resident)) if tiling.split > 1 else 1
    return max(arithmetic, cache, memory) + waves * BLOCK_CYCLES + fixed


def bucket(tokens: int) -> int:
    """Return the measured number of tokens that stands for ``tokens``: the next one up, or the largest."""
    return next((b for b in BUCKETS if tokens <= b), BUCKETS[-1])


def table_path(card: str) -> Path:
    """Return the file of a card's measured choices."""
    return TABLES / ("_".join(card.lower().split()[:2]) + ".json")


@lru_cache(maxsize=8)
def table(card: str) -> dict[str, list[int]]:
    """Return the measured choices for ``card`` ("NVIDIA H100 80GB HBM3" reads nvidia_h100.json), empty without one.

    Keys are "tokens,n,k,grouped" with tokens a bucket and grouped 0 or 1; values are [tokens, blocks, split, resident].
    """
    path = table_path(card)
    return json.loads(path.read_text())["tilings"] if path.is_file() else {}


@lru_cache(maxsize=4096)
def choose(tokens: int, n: int, k: int, grouped: bool, card: str = "", multiprocessors: int = 132) -> Tiling:
    """Return the tiling for ``tokens`` x ``n`` x ``k`` on ``card``."""
    measured = table(card).get(f"{bucket(tokens)},{n},{k},{int(grouped)}")
    if measured:
        return Tiling(*measured)
    return min(candidates(tokens, n, k, grouped), key=lambda t: cost(t, tokens, n, k, grouped, multiprocessors))
