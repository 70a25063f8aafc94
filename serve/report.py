"""Which kernel runs how many layers of a served model: what the engine writes and the launcher prints."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

FOLDER = "QTOOLKIT_KERNEL_REPORT"  # environment variable: where an engine's workers leave one JSON file each


@dataclass(frozen=True)
class Layer:
    """One linear layer as the engine runs it; ``reason`` says why it is not W4A8, and is empty if it is."""

    name: str
    kernel: str
    reason: str = ""


def kernels(layers: Iterable[Layer]) -> dict[str, int]:
    """Return the number of layers per kernel, the most used first."""
    return dict(Counter(layer.kernel for layer in layers).most_common())


def sentence(layers: Iterable[Layer]) -> str:
    """Return the start-up line: how many layers run on which kernel, and why any does not run W4A8."""
    layers = list(layers)
    counts = ", ".join(f"{count} on {kernel}" for kernel, count in kernels(layers).items())
    reasons: dict[str, list[str]] = {}
    for layer in layers:
        if layer.reason:
            reasons.setdefault(layer.reason, []).append(layer.name)
    why = "".join(f"; not W4A8: {_names(names)}: {reason}" for reason, names in reasons.items())
    return f"qtoolkit: of {len(layers)} linear layers {counts or 'none'}{why}."


def attention(reasons: Iterable[str]) -> str:
    """Return the line about attention: how many layers run on our kernel, and why others do not ("" is ours)."""
    counts = Counter(reasons)
    ours = counts.pop("", 0)
    why = "".join(f"; not {count}: {reason}" for reason, count in counts.items())
    return f"qtoolkit: attention of {ours} of {ours + counts.total()} layers runs on our kernel{why}."


def _names(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def write(layers: Iterable[Layer], part: str) -> None:
    """Leave the layers of one pipeline stage where the launcher looks, if it asked; the file appears whole."""
    folder = os.environ.get(FOLDER)
    if folder:
        path = Path(folder) / f"{part}.json"
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps([vars(layer) for layer in layers]))
        draft.rename(path)


def read(folder: Path) -> list[Layer]:
    """Return the layers of every stage that has reported into ``folder``."""
    return [Layer(**row) for path in sorted(folder.glob("*.json")) for row in json.loads(path.read_text())]
