"""Turns measured times into ratios and prints the tables: to bf16, to the best peer, and of the roofline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# Times by contender, then by "n x k", then by tokens: {"median": us, "low": us, "high": us}
Times = Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]

# Ratio to torch.mm bf16 that a number of tokens should reach, and the least that is worth shipping.
GOALS = {16: (3.7, 3.0), 32: (3.6, 2.8), 64: (3.4, 2.5), 128: (2.8, 1.9), 256: (1.85, 1.4), 4096: (1.65, 1.2)}

# Of ours, those that have a table of ratios to torch.mm.
OWN = (
    "ours", "ours g128", "ours g128 folded", "ours, product", "ours chained, product", "ours, two launches",
    "ours, triton",
)  # fmt: skip


def goal(tokens: int) -> tuple[float, float]:
    """Return (goal, floor) for ``tokens``."""
    return next((values for most, values in GOALS.items() if tokens <= most), GOALS[4096])


def roofline(tokens: int, n: int, k: int, bytes_per_second: float, operations_per_second: float) -> float:
    """Return the least microseconds a W4A8 layer can take: its bytes once, or its multiply-adds."""
    moved = n * k / 2 + tokens * (k + 2 * n) + 4 * (n + tokens)
    return 1e6 * max(moved / bytes_per_second, 2 * tokens * n * k / operations_per_second)


def ratios(times: Times, of: str, to: str) -> dict[str, dict[str, float]]:
    """Return how many times faster ``of`` is than ``to``, by shape and tokens, where both were measured."""
    found: dict[str, dict[str, float]] = {}
    for shape, row in times.get(of, {}).items():
        for tokens, time in row.items():
            other = times.get(to, {}).get(shape, {}).get(tokens)
            if other:
                found.setdefault(shape, {})[tokens] = round(other["median"] / time["median"], 3)
    return found


def best_peer(times: Times, peers: Iterable[str], shape: str, tokens: str) -> tuple[str, float] | None:
    """Return the fastest of ``peers`` at a point and its median, or None if none was measured there."""
    there = [(name, times.get(name, {}).get(shape, {})) for name in peers]
    found = [(name, row[tokens]["median"]) for name, row in there if tokens in row]
    return min(found, key=lambda item: item[1]) if found else None


def table(title: str, rows: Mapping[str, Mapping[str, float | str]]) -> str:
    """Return a Markdown table of shapes by tokens."""
    columns = sorted({tokens for row in rows.values() for tokens in row}, key=int)
    lines = [f"**{title}**", "", "| n x k | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for shape, row in rows.items():
        cells = [f"{row[c]:.2f}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in columns]
        lines.append(f"| {shape} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def tables(times: Times, kinds: Mapping[str, str], bytes_per_second: float, operations_per_second: float) -> str:
    """Return every table of a run: times of ours, ratios, fraction of the roofline, and how many goals hold."""
    texts = []
    medians = {s: {t: v["median"] for t, v in row.items()} for s, row in times.get("ours", {}).items()}
    texts.append(table("ours, quantization + product, microseconds", medians))
    for name in OWN:
        found = ratios(times, name, "torch.mm bf16")
        if found:
            texts.append(table(f"{name}: times faster than torch.mm bf16", found))
    for name, to in (("ours g128", "ours"), ("ours g128 folded", "ours"), ("ours g128 folded", "ours g128")):
        grouped = ratios(times, name, to)
        if grouped:
            texts.append(table(f"{name}: speed as a share of {to}{' per channel' * (to == 'ours')}", grouped))
    peers = [name for name, kind in kinds.items() if kind in ("w8a8", "w4a8") and "product" not in name]
    against: dict[str, dict[str, float]] = {}
    share: dict[str, dict[str, float]] = {}
    for shape, row in medians.items():
        n, k = (int(side) for side in shape.split("x"))
        for tokens, ours in row.items():
            peer = best_peer(times, peers, shape, tokens)
            if peer:
                against.setdefault(shape, {})[tokens] = peer[1] / ours
            floor = roofline(int(tokens), n, k, bytes_per_second, operations_per_second)
            share.setdefault(shape, {})[tokens] = floor / ours
    if against:
        texts.append(table("ours: times faster than the best peer (w8a8 or w4a8)", against))
    texts.append(table("ours: fraction of the roofline (measured bandwidth and int8 rate)", share))
    humming = [value for row in ratios(times, "ours", "humming").values() for value in row.values()]
    if humming:
        texts.append(f"ahead of humming at {sum(v > 1 for v in humming)} of {len(humming)} points\n")
    points = [(int(t), v) for row in ratios(times, "ours", "torch.mm bf16").values() for t, v in row.items()]
    if points:
        reached = sum(value >= goal(tokens)[0] for tokens, value in points)
        shippable = sum(value >= goal(tokens)[1] for tokens, value in points)
        texts.append(f"goals: {reached} of {len(points)} reached, {shippable} at or above the floor\n")
    return "\n".join(texts)
