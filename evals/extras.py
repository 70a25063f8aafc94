"""Says in one sentence which optional package is missing, before it is needed."""

from __future__ import annotations

from importlib.util import find_spec

from qtoolkit.errors import RequestError


def need(what: str, *packages: str) -> None:
    """Check that ``packages`` can be imported, without importing them; ``what`` is what needs them.

    Raises:
        RequestError: one or more are not installed.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise RequestError(
            f"{what} needs {', '.join(missing)}, which {verb} not installed.", "pip install 'qtoolkit[eval]'"
        )
