"""The errors a user can meet: one sentence with the values, one hint, and an exit code that says whose fault it is."""

from __future__ import annotations


class QToolkitError(Exception):
    """Something could not be done; ``message`` says what with the values, ``hint`` says what to do next."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


def said(error: BaseException, most: int = 200) -> str:
    """Return what another library's error says: on one line, cut at a word after ``most`` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[:most].rsplit(' ', 1)[0]} ..."


class RequestError(QToolkitError):
    """The request itself is wrong: an unknown name, key or value, a path that is not there."""

    exit_code = 2


class ModelError(QToolkitError):
    """The model cannot be read or is not supported."""


class DataError(QToolkitError):
    """Calibration or evaluation data is missing, empty or too short."""


class CheckpointError(QToolkitError):
    """A packed checkpoint is damaged, incomplete, or of a newer schema."""


class NumericError(QToolkitError):
    """NaN or Inf was met where only finite numbers make sense."""


class ServeError(QToolkitError):
    """The server could not be started or died."""


class GateError(QToolkitError):
    """A measured value is worse than the bound the user set."""

    exit_code = 3
