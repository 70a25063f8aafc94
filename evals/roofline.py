"""Files of a kernel benchmark: the rows as JSON, a table as Markdown, and every row in the machine's roofline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qtoolkit.evals import kernel_bench

MARKS = "osD^vP*Xhd<>p8"


def write(result: dict[str, Any], folder: Path) -> Path:
    """Write kernels.json, kernels.md and roofline.svg of a ``kernel_bench`` result; return the drawing's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernels.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    (folder / "kernels.md").write_text(f"```\n{kernel_bench.table(result)}\n```\n", "utf-8")
    return draw(result, folder / "roofline.svg")


def draw(result: dict[str, Any], file: Path) -> Path:
    """Draw int8 operations a second over operations a weight byte, below the limits measured in the same run.

    Rows of one contestant have one mark; a contestant that multiplies in bfloat16 has another ceiling than the one
    drawn, which is the int8 peak.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(row["name"] for row in result["rows"]))
    seen = []
    for index, name in enumerate(names):
        rows = [row for row in result["rows"] if row["name"] == name]
        work = [row["gops"] / row["gbs"] for row in rows]  # operations a weight byte
        seen += work
        axes.plot(work, [row["gops"] for row in rows], MARKS[index % len(MARKS)], label=name, alpha=0.8, markersize=5)
    bandwidth, peak = (result["limits"][name] for name in ("bandwidth_gbs", "int8_gops"))
    if bandwidth and peak:
        ends = [min(seen) / 1.5, peak / bandwidth, max([*seen, peak / bandwidth]) * 1.5]
        axes.plot(ends, [min(x * bandwidth, peak) for x in ends], "k-", linewidth=1, label="measured limit")
    axes.set(xscale="log", yscale="log", xlabel="operations a byte of weights", ylabel="billion operations a second")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(file)
    return file
