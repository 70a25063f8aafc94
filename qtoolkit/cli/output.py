"""What a command prints: data on stdout, words on stderr, errors in one form."""

from __future__ import annotations

import json
import sys
from typing import Any


def result(text: str) -> None:
    """Print a result for a person on stdout."""
    print(text, flush=True)


def emit(data: Any) -> None:
    """Print the command's one JSON object on stdout."""
    print(json.dumps(data, ensure_ascii=False), flush=True)


def note(text: str) -> None:
    """Print a word to the user on stderr."""
    print(text, file=sys.stderr, flush=True)


def error(message: str, hint: str, code: int, *, as_json: bool) -> None:
    """Print an error: one sentence and one hint on stderr, and with ``--json`` an object on stdout too."""
    note(f"qtoolkit: {message}")
    if hint:
        note(f"hint: {hint}")
    if as_json:
        emit({"ok": False, "error": message, "hint": hint, "exit_code": code})


def quiet_libraries() -> None:
    """Keep the progress bars and warnings of the libraries below out of the user's terminal."""
    from datasets.utils.logging import disable_progress_bar as quiet_datasets
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    quiet_datasets()


def bar() -> Any:
    """Return a running progress bar below the lines on stderr, or None where that is no terminal."""
    if not sys.stderr.isatty():
        return None
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    made = Progress(*columns, console=Console(stderr=True), transient=True)
    made.start()
    return made


def megabytes(size: int) -> str:
    """Return a size in bytes as a person reads it."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def seconds(value: float) -> str:
    """Return a duration as a person reads it."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
