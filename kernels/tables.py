"""Measured tilings: finds, reads and writes the table of a card, and refuses a damaged one in a sentence.

A table is data, ``tuning/BACKEND-CARD.json`` or ``tuning/BACKEND-ARCHITECTURE.json``; see ``tuning/README.md``. The
folder named by QTOOLKIT_TUNING is looked through before the shipped one.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

SHIPPED = Path(__file__).parent / "tuning"
SCHEMA = 1
KEYS = {"schema", "backend", "card", "measured", "columns", "tilings"}


@dataclass(frozen=True, order=True)
class Point:
    """A measured size: bucket of tokens, outputs, inputs, and whether scales are per group."""

    tokens: int
    n: int
    k: int
    grouped: bool

    @property
    def key(self) -> str:
        """Return the point as a table names it, such as ``16,4096,4096,group``."""
        return f"{self.tokens},{self.n},{self.k},{'group' if self.grouped else 'channel'}"

    @staticmethod
    def of(key: str) -> Point:
        """Read ``key``; raises ValueError."""
        tokens, n, k, scales = key.split(",")
        if scales not in ("group", "channel"):
            raise ValueError(f"{scales!r} is neither 'group' nor 'channel'")
        return Point(int(tokens), int(n), int(k), scales == "group")


Rows = Mapping[Point, tuple[int, ...]]
Refuse = Callable[[Point, tuple[int, ...]], str | None]  # why a backend cannot run a row, or None


def name_of(card: str) -> str:
    """Return a card's part of a file's name: "NVIDIA H100 80GB HBM3" is nvidia_h100."""
    return "_".join(card.lower().split()[:2])


def paths(backend: str, card: str, architecture: str) -> Iterator[Path]:
    """Yield where a table may lie, the most specific place first."""
    own = os.environ.get("QTOOLKIT_TUNING")
    for folder in ([Path(own)] if own else []) + [SHIPPED]:
        for name in (name_of(card), architecture):
            if name:
                yield folder / f"{backend}-{name}.json"


def find(backend: str, card: str, architecture: str, columns: tuple[str, ...], refuse: Refuse) -> Rows:
    """Return the rows of the first table there is for ``card``; none without one.

    A damaged table is set aside with a warning that says what is wrong: a serving process goes on with heuristics.
    """
    path = next((path for path in paths(backend, card, architecture) if path.is_file()), None)
    if path is None:
        return {}
    try:
        return read(path, backend, columns, refuse)
    except ValueError as error:
        warnings.warn(f"{error} Tilings are chosen by estimate instead.", RuntimeWarning, stacklevel=2)
        return {}


def read(path: Path, backend: str, columns: tuple[str, ...], refuse: Refuse) -> Rows:
    """Read a table.

    Raises:
        ValueError: it is damaged, of another schema or backend, or names a tiling that the backend cannot run.
    """

    def no(why: str) -> ValueError:
        return ValueError(f"The tuning table {path.name} cannot be used: {why}.")

    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise no(f"it is not JSON ({error})") from None
    if not isinstance(data, dict) or set(data) != KEYS:
        raise no(f"its keys must be {', '.join(sorted(KEYS))}")
    for key, wanted in (("schema", SCHEMA), ("backend", backend), ("columns", list(columns))):
        if data[key] != wanted:
            raise no(f"{key} is {data[key]!r}, not {wanted!r}")
    rows = {}
    for key, values in data["tilings"].items() if isinstance(data["tilings"], dict) else ():
        if not (isinstance(values, list) and len(values) == len(columns) and all(type(v) is int for v in values)):
            raise no(f"row {key!r} is {values!r}, not the {len(columns)} integers {', '.join(columns)}")
        try:
            point = Point.of(key)
        except ValueError as error:
            raise no(f"row {key!r} is no point: {error}") from None
        if reason := refuse(point, tuple(values)):
            raise no(f"row {key!r}: {reason}")
        rows[point] = tuple(values)
    if not rows:
        raise no("it has no tilings")
    return rows


def write(
    path: Path, backend: str, card: str, measured: Mapping[str, object], columns: tuple[str, ...], rows: Rows
) -> None:
    """Write a table, a row a line so that two versions can be compared; whoever reads sees the old file or the new."""
    head = {"schema": SCHEMA, "backend": backend, "card": card, "measured": dict(measured), "columns": list(columns)}
    lines = ",\n".join(f'  "{point.key}": {list(rows[point])}' for point in sorted(rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(json.dumps(head)[:-1] + f', "tilings": {{\n{lines}\n}}}}\n')
    os.replace(temporary, path)
