"""Numbers as a reader wants them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qtoolkit.evals.results import Scores


def percent(share: float, digits: int = 2) -> str:
    """Return 0.0173 as ``1.73 %``."""
    return f"{share * 100:.{digits}f} %"


def signed_percent(share: float, digits: int = 2) -> str:
    """Return 0.0173 as ``+1.73 %``."""
    return f"{share * 100:+.{digits}f} %"


def plus_minus(error: float | None, form: Callable[[float], str]) -> str:
    """Return a standard error as ``± 0.20 %``; nothing where it is not known."""
    return "" if error is None else f"± {form(error)}"


def short(value: float | None) -> str:
    """Return three significant digits: 0.0123, 1.23e-05."""
    return "" if value is None else f"{value:.3g}"


def count(value: float) -> str:
    """Return a perplexity: 12.34, 4,425, 4.43e+06."""
    return f"{value:.2f}" if value < 1e3 else f"{value:,.0f}" if value < 1e6 else f"{value:.2e}"


def size(bytes_: float) -> str:
    """Return bytes as ``12.3 MB``."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if bytes_ >= factor:
            return f"{bytes_ / factor:.1f} {unit}"
    return f"{bytes_:.0f} B"


def duration(seconds: float) -> str:
    """Return seconds as ``12.3 ms``, ``4.5 s`` or ``3 min 20 s``."""
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def title(name: str) -> str:
    """Return a model's name without the folders before it."""
    return PurePath(name).name or name


def short_name(scores: Scores | None) -> str:
    """Return what a table calls a model: its scheme, or float."""
    return "" if scores is None else scores.scheme or "float"
