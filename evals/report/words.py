"""Numbers as a reader wants them."""

from __future__ import annotations

from collections.abc import Callable


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


def size(count: float) -> str:
    """Return bytes as ``12.3 MB``."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Return seconds as ``12.3 ms``, ``4.5 s`` or ``3 min 20 s``."""
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
