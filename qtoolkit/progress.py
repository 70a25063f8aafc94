"""Who is told how a run goes: the command line draws it, the Python interface stays silent."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Whoever wants to watch a run: the command line draws it."""

    def start(self, blocks: int, done: int) -> None:
        """A run of ``blocks`` blocks begins, of which ``done`` were finished by an earlier, interrupted run."""
        ...

    def say(self, text: str) -> None:
        """Something worth a line happened."""
        ...

    def block(self, name: str, error: float) -> None:
        """A block is finished; ``error`` is the mean relative error of its layers."""
        ...


class Silent:
    """Watches without a word: the default of the Python interface."""

    def start(self, blocks: int, done: int) -> None:
        """Say nothing."""

    def say(self, text: str) -> None:
        """Say nothing."""

    def block(self, name: str, error: float) -> None:
        """Say nothing."""
