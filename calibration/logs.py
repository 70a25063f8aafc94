"""What a training writes down after every epoch: a small CSV file, and TensorBoard events where that is installed."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

CSV = "training.csv"
EVENTS = "tensorboard"


def write(folder: Path, report: Mapping[str, Mapping[str, float]]) -> None:
    """Write every epoch so far to ``folder``; ``report`` is ``{"epoch-1": {"loss": ...}, ...}``.

    The CSV file is written anew each time, so an interrupted run leaves no half or double line; TensorBoard gets the
    last epoch's figures only.
    """
    columns = list(next(iter(report.values())))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["epoch", *columns])
    table.writerows([epoch.removeprefix("epoch-"), *figures.values()] for epoch, figures in report.items())
    temporary = folder / f"{CSV}.tmp"
    temporary.write_text(text.getvalue(), "utf-8")
    temporary.replace(folder / CSV)
    if find_spec("tensorboard") is not None:
        _events(folder / EVENTS, len(report), list(report.values())[-1])


def _events(folder: Path, epoch: int, figures: Mapping[str, float]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for name, value in figures.items():
            writer.add_scalar(f"training/{name}", value, epoch)
