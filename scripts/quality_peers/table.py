"""The bench's table: one row a peer, the spread over calibration seeds, and our loss as a share of the best peer's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

OURS = "qtoolkit"
BASELINES = ("rtn",)  # rounding is nobody's best


@dataclass(frozen=True)
class Row:
    """One peer on one model in one layout.

    Attributes:
        peer: its name.
        runs: one a calibration seed: scores (``ppl``, ``kl``, ``tasks``) and figures (``seconds``, ``bits``, ...).
        reason: why it could not run, where it could not.
    """

    peer: str
    runs: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    reason: str | None = None

    def values(self, *keys: str) -> list[float]:
        """Return one value a seed, found by ``keys``."""
        found = []
        for run in self.runs:
            value: Any = run
            for key in keys:
                value = value[key]
            found.append(float(value))
        return found


def markdown(model: str, layout: str, reference: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Return the table of one model in one layout; ``reference`` has the float model's scores."""
    names, tasks = list(reference["ppl"]), list(reference["tasks"])
    head = ["peer", *(title for name in names for title in (f"ppl {name}", "change")), "KL"]
    head += [*tasks, "seconds", "peak MB", "bits"]
    lines = [
        f"**{model}, {layout}**", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head),
        "| " + " | ".join(["float", *(cell for name in names for cell in (f"{reference['ppl'][name]:.4f}", "")), "",
                           *(f"{reference['tasks'][task]:.3f}" for task in tasks), "", "", ""]) + " |",
    ]  # fmt: skip
    for row in rows:
        if row.reason is not None:
            lines.append(f"| {row.peer} | cannot run: {row.reason} |" + " |" * (len(head) - 2))
            continue
        cells = [row.peer]
        for name in names:
            values = row.values("ppl", name)
            changes = [100 * (value / reference["ppl"][name] - 1) for value in values]
            cells += [spread(values, ".4f"), spread(changes, "+.3f") + " %"]
        cells += [
            spread(row.values("kl"), ".5f") if names else "",
            *(spread(row.values("tasks", task), ".3f") for task in tasks),
            f"{mean(row.values('seconds')):.1f}",
            f"{mean(row.values('peak_rss_bytes')) / 1e6:.0f}",
            f"{mean(row.values('bits')):.3f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *against_the_best(reference, rows)])


def against_the_best(reference: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """Return lines about each of our rows: our loss as a share of the best peer's, on every text and in KL."""
    ran = [row for row in rows if row.runs]
    ours = [row for row in ran if row.peer.partition(":")[0] == OURS]
    peers = [row for row in ran if row not in ours and row.peer not in BASELINES]
    if not ours or not peers or not reference["ppl"]:
        return []
    lines = [""]
    for name, before in reference["ppl"].items():
        losses = {row.peer: mean(row.values("ppl", name)) - before for row in ran}
        best = min((row.peer for row in peers), key=losses.__getitem__)
        for row in ours:
            share = (
                f", {losses[row.peer] / losses[best]:.2f} of the best peer's" if losses[best] > 0 else "; the best is"
            )
            lines.append(f"- {name}: {row.peer} loses {losses[row.peer]:+.4f}{share} ({best}, {losses[best]:+.4f})")
    kls = {row.peer: mean(row.values("kl")) for row in ran}
    best = min((row.peer for row in peers), key=kls.__getitem__)
    lines += [
        f"- KL: {row.peer} {kls[row.peer]:.5f}, {kls[row.peer] / kls[best]:.2f} of the best peer's ({best})"
        for row in ours
    ]
    return lines


def spread(values: Sequence[float], form: str) -> str:
    """Return the mean, and half the distance from the lowest to the highest where there are several."""
    text = f"{mean(values):{form}}"
    return text if len(values) == 1 else f"{text} ± {(max(values) - min(values)) / 2:{form.lstrip('+')}}"


def mean(values: Sequence[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)
