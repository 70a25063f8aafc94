"""What every way of serving has in common: what is asked for, what is said when ready, and how it is stopped."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from qtoolkit.errors import RequestError, ServeError

ENGINES = ("vllm", "transformers")
VISION = "vision"  # the server of image classifiers; the checkpoint chooses it


@dataclass(frozen=True)
class Order:
    """What to serve and where; ``extra`` goes to the engine as it stands."""

    path: Path
    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = ""
    extra: tuple[str, ...] = ()
    device: str = "auto"  # see qtoolkit.device; vLLM serves on what its build is for
    reference: str = ""  # of an image classifier: what it was made from, served beside it
    python: str = sys.executable  # whose vLLM serves


@dataclass(frozen=True)
class Ready:
    """What is told when the server answers: OpenAI base URL, model name, layers per kernel."""

    url: str
    model: str
    kernels: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Return the object that ``--json`` prints."""
        return {"ok": True, "url": self.url, "model": self.model, "kernels": self.kernels}


Announce = Callable[[Ready], None]
Say = Callable[[str], None]


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: an orderly stop was asked for."""


def choose_engine(wanted: str) -> str:
    """Return the engine to use: the one asked for, or vLLM where it is installed.

    Raises:
        RequestError: no engine of that name.
        ServeError: the engine asked for is not installed.
    """
    installed = [name for name in ENGINES if find_spec(name) is not None]
    if not wanted:
        return installed[0]
    if wanted not in ENGINES:
        raise RequestError(f"There is no engine {wanted!r}.", f"Use one of: {', '.join(ENGINES)}.")
    if wanted not in installed:
        raise ServeError(
            f"{wanted} is not installed.", "`pip install 'qtoolkit[serve-cpu]'`, on a GPU machine [serve]."
        )
    return wanted


def serve(engine: str, order: Order, announce: Announce, say: Say) -> None:
    """Serve until the server ends or somebody stops it.

    Raises:
        RequestError: the port is in use, or an argument is wrong.
        ServeError: the server did not start, or died.
        Terminated: SIGTERM arrived; the server is stopped by then.
        KeyboardInterrupt: likewise for Ctrl-C.
    """
    with sigterm_raises():
        if engine == VISION:
            from qtoolkit.serve.vision_server import serve_vision

            serve_vision(order, announce, say)
        elif engine == "vllm":
            from qtoolkit.serve.vllm_server import serve_with_vllm

            serve_with_vllm(order, announce, say)
        else:
            from qtoolkit.serve.transformers_server import serve_with_transformers

            serve_with_transformers(order, announce, say)


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Raise ``Terminated`` on the first SIGTERM, so that clean-up code runs; later ones change nothing."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
