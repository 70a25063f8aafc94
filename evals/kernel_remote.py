"""Contestants of the kernel benchmark that need a Python of their own: a worker process times them in our turns."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from qtoolkit.errors import RequestError

FOLDER = Path(str(files("qtoolkit.evals"))) / "kernel_workers"
WORKERS = {"zentorch": "zentorch_worker.py", "llamacpp": "ggml_worker.py"}  # scripts in that folder


@dataclass(frozen=True)
class Worker:
    """A running worker and what it can time: name to bits a value and whether activations are int8."""

    process: subprocess.Popen[str]
    kinds: Mapping[str, Mapping[str, Any]]

    def ask(self, **order: Any) -> dict[str, Any]:
        """Send one order and return the answer.

        Raises:
            RequestError: the worker has died.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended: no answer comes, which is said below
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):  # anything else is a library's greeting
                return json.loads(line)
        status = self.process.wait()
        raise RequestError(f"A benchmark worker ended with status {status}.", "Its messages stand above.")


@contextmanager
def workers(wanted: Sequence[str]) -> Iterator[list[Worker]]:
    """Start a worker for every ``NAME=PYTHON[:FOLDER]``, such as ``zentorch=~/zen/bin/python``; all end with the block.

    Raises:
        RequestError: an unknown name, no such program, or a worker that does not start.
    """
    with ExitStack() as stack:
        started = []
        for word in wanted:
            name, _, command = word.partition("=")
            program, *rest = command.split(":")
            if name not in WORKERS or not Path(program).expanduser().is_file():
                known = ", ".join(f"{known}=PYTHON" for known in WORKERS)
                raise RequestError(f"--peer {word} names no worker and Python program.", f"Use {known}.")
            arguments = [program, str(FOLDER / WORKERS[name]), str(torch.get_num_threads()), *rest]
            process = subprocess.Popen(
                [str(Path(part).expanduser()) for part in arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            started.append(Worker(process, Worker(process, {}).ask()))
        yield started
