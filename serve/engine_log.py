"""An engine's output: passed on line by line, its end remembered, so that a failure can be told in one sentence."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable
from threading import Thread

REMEMBERED = 500  # lines; a traceback of a nested failure takes about 200
# "(EngineCore pid=12) ERROR 11-21 03:18:16 [core.py:1510] " and colours stand before what the engine says
PREFIX = re.compile(
    r"\x1b\[[0-9;]*m|^\((?:\w|[-.])+(?: pid=\d+)?\)\s*|(?:INFO|WARNING|ERROR) [-\d]+ [:\d]+ \[[^]]*\]\s?"
)
RAISED = re.compile(r"^(?:\w+\.)*(\w*(?:Error|Exception|Refused|Exceeded))\b:? *(.*)$")
USAGE = re.compile(r"^\S+: error: (.+)$")  # argparse
ECHOES = ("Engine core initialization failed", "WorkerProc initialization failed", "Executor failed")  # not the cause


class EngineLog:
    """Reads a server's output in a thread of its own until it closes."""

    def __init__(self, lines: Iterable[str], pass_on: Callable[[str], None]) -> None:
        self._last: deque[str] = deque(maxlen=REMEMBERED)
        self._lines, self._pass_on = lines, pass_on
        self._thread = Thread(target=self._read, name="engine-log", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for line in self._lines:
            self._last.append(line.rstrip("\n"))
            self._pass_on(line.rstrip("\n"))

    def failure(self) -> str:
        """Return the engine's own last error line, once its output has ended."""
        self._thread.join(timeout=2)
        return last_error(self._last)

    def misused(self) -> str | None:
        """Return what the engine says about its arguments, if that is why it ended."""
        self._thread.join(timeout=2)
        found = [match.group(1) for line in self._last if (match := USAGE.match(plain(line)))]
        return found[-1] if found else None


def plain(line: str) -> str:
    """Return a log line without colours, process names and time stamps."""
    previous = None
    while previous != line:
        previous, line = line, PREFIX.sub("", line)
    return line.strip()


def last_error(lines: Iterable[str]) -> str:
    """Return the last line that names an exception and is not the echo of an earlier one.

    A validation error says what is wrong on the next line, which is then taken too.
    """
    said = [plain(line) for line in lines]
    best = ""
    for at, line in enumerate(said):
        match = RAISED.match(line)
        if match is None or any(echo in line for echo in ECHOES):
            continue
        text = match.group(2) or match.group(1)
        if "validation error" in text:
            text = next((after for after in said[at + 1 : at + 4] if after.startswith("Value error")), text)
            text = text.removeprefix("Value error, ").split(" [type=")[0]
        best = text
    return best or next((line for line in reversed(said) if line), "it said nothing")
