"""Chooses how a linear is cut into tiles: from this card's measured table if one is shipped, else by a cost model."""

from __future__ import annotations

from dataclasses import astuple, replace
from functools import lru_cache

from qtoolkit.kernels import tables
from qtoolkit.kernels.cuda.layout import K_BLOCK, padded
from qtoolkit.kernels.cuda.source import MAX_SHARE, Tiling, stage_bytes

ARCHITECTURE = "sm_90"
COLUMNS = ("tokens", "blocks", "split", "resident", "fused", "pingpong", "streamed")
# A thread holds blocks * tokens / 2 sums, with groups tokens / 2 more; small tiles leave room for two blocks at once.
SHAPES = tuple(
    [Tiling(tokens, 1, 1, 2) for tokens in (8, 16, 32, 48, 64)]
    + [Tiling(tokens, 1, 1, 1) for tokens in (96, 128, 256)]
    + [Tiling(tokens, 2, 1, 1) for tokens in (64, 96, 128)]
    + [Tiling(tokens, 1, 1, 2, fused=True) for tokens in (8, 16)]
    + [Tiling(tokens, 1, 1, 1, pingpong=True) for tokens in (64, 96, 128, 160)]
    + [Tiling(tokens, 1, 1, 2, streamed=True) for tokens in (8, 16, 32)]
    + [Tiling(64, 1, 1, 1, streamed=True)]
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
QUANTIZE_CYCLES = 3500  # a launch of the quantizer: about 2 microseconds, of which the early start hides a part
FUSED_CYCLES = 1800  # tokens from L2, the maxima's meeting, and the codes, in each wave of blocks


def refuse(tiling: Tiling, tokens: int, n: int, k: int, grouped: bool) -> str | None:
    """Return why the kernels cannot run this size so, or why it would plainly be a waste; None if they can."""
    k_blocks = padded(k) // K_BLOCK
    if replace(tiling, split=1) not in SHAPES or tiling.split not in SPLITS:
        return f"there is no such tile: {astuple(tiling)}"
    if padded(n) % (128 * tiling.blocks):
        return f"{padded(n)} rows are no whole number of tiles of {128 * tiling.blocks}"
    if grouped and tiling.tokens > 128:
        return f"the sums of a group and of all groups for {tiling.tokens} tokens do not fit into the registers"
    if tiling.pingpong and tiling.split > 1:
        return "warpgroups that own whole tiles do not share them with other blocks"
    if tiling.streamed and tiling.split > 1:
        return "where all work is dealt out in equal shares, no cluster splits it again"
    if tiling.streamed and tokens > 64:
        return "parts of tiles go through memory, which is for few tokens"
    if tiling.split > k_blocks:
        return f"{tiling.split} blocks cannot share {k_blocks} blocks of inputs"
    if tiling.tokens >= 2 * max(tokens, 8):
        return f"a tile of {tiling.tokens} tokens would be mostly empty with {tokens}"
    if tiling.fused and tokens > tiling.tokens:
        return f"a block quantizes one tile of {tiling.tokens} tokens, not {tokens}"
    if tiling.fused and tiling.share(k_blocks) > MAX_SHARE:
        return f"a block's share of {tiling.share(k_blocks) * K_BLOCK} inputs does not fit into its registers"
    return None


def candidates(tokens: int, n: int, k: int, grouped: bool) -> list[Tiling]:
    """Return every tiling that is not refused for this size."""
    every = (replace(shape, split=split) for shape in SHAPES for split in SPLITS)
    return [tiling for tiling in every if refuse(tiling, tokens, n, k, grouped) is None]


def cost(tiling: Tiling, tokens: int, n: int, k: int, grouped: bool, multiprocessors: int) -> float:
    """Estimate the cycles of quantizing and multiplying: the largest of arithmetic, L2 and memory, plus the rest."""
    rows, k_blocks = 128 * tiling.blocks, padded(k) // K_BLOCK
    blocks = (padded(n) // rows) * -(-tokens // tiling.tokens) * tiling.split
    rounds = -(-blocks // multiprocessors)  # blocks that the busiest multiprocessor works on
    steps = -(-k_blocks // tiling.split)
    product = rows * tiling.tokens * K_BLOCK / PRODUCTS_PER_CYCLE * (1.2 if grouped else 1.0)
    fixed = FINISH_CYCLES * tiling.tokens / 128 + (MEETING_CYCLES if tiling.split > 1 else 0)
    arithmetic = rounds * (steps * (product + K_BLOCK_CYCLES) + fixed / tiling.resident)
    token_bytes = 2 if tiling.fused else 1
    stage = stage_bytes(tiling.tokens, tiling.blocks, grouped) + (token_bytes - 1) * tiling.tokens * K_BLOCK
    cache = blocks * steps * stage / CACHE_BYTES_PER_CYCLE
    used = min(1.0, blocks / multiprocessors)
    memory = (n * k / 2 + tokens * (k + 2 * n)) / (MEMORY_BYTES_PER_CYCLE * min(1.0, 1.2 * used))
    waves = -(-blocks // (multiprocessors * tiling.resident)) if tiling.split > 1 else 1
    start = waves * (BLOCK_CYCLES + (FUSED_CYCLES if tiling.fused else 0)) + (0 if tiling.fused else QUANTIZE_CYCLES)
    return max(arithmetic, cache, memory) + start + fixed


def bucket(tokens: int) -> int:
    """Return the measured number of tokens that stands for ``tokens``: the next one up, or the largest."""
    return next((b for b in BUCKETS if tokens <= b), BUCKETS[-1])


def refuse_row(point: tables.Point, row: tuple[int, ...]) -> str | None:
    """Return why a table's row cannot be used, or None."""
    return refuse(tiling_of(row), point.tokens, point.n, point.k, point.grouped)


def tiling_of(row: tuple[int, ...]) -> Tiling:
    """Return a table's row as a tiling; see ``COLUMNS``."""
    tokens, blocks, split, resident, fused, pingpong, streamed = row
    return Tiling(tokens, blocks, split, resident, bool(fused), bool(pingpong), bool(streamed))


@lru_cache(maxsize=8)
def table(card: str) -> tables.Rows:
    """Return the measured choices for ``card``, such as "NVIDIA H100 80GB HBM3"; empty without a table."""
    return tables.find("cuda", card, ARCHITECTURE, COLUMNS, refuse_row) if card else {}


@lru_cache(maxsize=4096)
def choose(tokens: int, n: int, k: int, grouped: bool, card: str = "", multiprocessors: int = 132) -> Tiling:
    """Return the tiling for ``tokens`` x ``n`` x ``k`` on ``card``."""
    measured = table(card).get(tables.Point(bucket(tokens), n, k, grouped))
    if measured:
        return tiling_of(measured)
    return estimate(tokens, n, k, grouped, multiprocessors)


def estimate(tokens: int, n: int, k: int, grouped: bool, multiprocessors: int = 132, fused: bool = True) -> Tiling:
    """Return the tiling with the least estimated cost; ``fused`` False: among those for quantized tokens.

    Ping-pong and streams are not among them: a measured table alone can choose those.
    """
    every = (tiling for tiling in candidates(tokens, n, k, grouped) if not (tiling.pingpong or tiling.streamed))
    found = [tiling for tiling in every if fused or not tiling.fused]
    return min(found, key=lambda t: cost(t, tokens, n, k, grouped, multiprocessors))
