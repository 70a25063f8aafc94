"""Runs vLLM's OpenAI server as a child process, watches it until it answers, and stops it with all it started."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from qtoolkit.errors import RequestError, ServeError
from qtoolkit.serve import machine, process, report
from qtoolkit.serve.address import choose_port, url
from qtoolkit.serve.engine_log import EngineLog
from qtoolkit.serve.launcher import Announce, Order, Ready, Say

# Not the `vllm` script: that of the CPU distribution looks for a distribution named vllm and dies.
SERVER = "vllm.entrypoints.openai.api_server"
OURS = ("--model", "--host", "--port", "--api-key", "--served-model-name")
POLL = 0.2  # seconds between two questions whether the server answers
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy stands before this machine


def serve_with_vllm(order: Order, announce: Announce, say: Say) -> None:
    """Serve ``order`` until the server ends or an exception (a signal) asks for the end; see ``launcher.serve``."""
    with running(order, say) as server:
        announce(server.ready)
        server.child.wait()
        raise ServeError(f"vLLM ended by itself: {server.log.failure()}", "Its messages above say more.")


@dataclass(frozen=True)
class Server:
    """A server that answers: what there is to tell of it, its process, its messages."""

    ready: Ready
    child: subprocess.Popen[str]
    log: EngineLog


@contextmanager
def running(order: Order, say: Say) -> Iterator[Server]:
    """Start a server, yield it when it answers, and stop it at the end with all it started.

    Raises:
        RequestError: an argument is wrong, or the port is in use.
        ServeError: it did not start.
    """
    refuse_arguments(order.extra)
    refuse_device(order.device)
    port = choose_port(order.host, order.port)
    root = url(order.host, port)
    say(f"starting vLLM for {order.name} on {root}")
    with TemporaryDirectory(prefix="qtoolkit-serve-") as folder:
        child = process.start(command(order, port), environment(order, Path(folder)))
        assert child.stdout is not None
        log = EngineLog(child.stdout, say)
        try:
            _wait_until_healthy(child, log, root)
            layers = report.read(Path(folder))
            if not layers:
                say("vLLM did not load the qtoolkit plugin (VLLM_PLUGINS?): its own kernels run")
            yield Server(Ready(f"{root}/v1", order.name, report.kernels(layers)), child, log)
        finally:
            process.stop(child)


def refuse_arguments(extra: tuple[str, ...]) -> None:
    """Refuse arguments after ``--`` that qtoolkit sets itself.

    Raises:
        RequestError: naming the first one.
    """
    for argument in extra:
        if argument.split("=")[0] in OURS:
            name = argument.split("=")[0]
            hint = "The model is the command's argument." if name == "--model" else f"Give {name} before the `--`."
            raise RequestError(f"{name} cannot be passed on to vLLM: qtoolkit sets it.", hint)


def refuse_device(device: str) -> None:
    """Refuse a device that this build of vLLM is not for.

    Raises:
        RequestError: it is for the other one.
    """
    own = "cpu" if machine.vllm_is_for_cpu() else "cuda"
    if device not in ("auto", own):
        raise RequestError(
            f"The installed vLLM serves on {own}, not on {device}.", "Drop --device, or install the other."
        )


def command(order: Order, port: int) -> list[str]:
    """Return the server's command line; the API key is not on it, because any user can read it there."""
    cpu = machine.vllm_is_for_cpu()
    eager = ["--enforce-eager"] if cpu and not machine.has_compiler() else []
    executor = machine.executor(order.extra) if cpu else []
    own = ["--model", str(order.path), "--served-model-name", order.name, "--host", order.host, "--port", str(port)]
    return [order.python, "-m", SERVER, *own, *eager, *executor, *order.extra]


def environment(order: Order, folder: Path) -> dict[str, str]:
    """Return the server's environment: ours, defaults for what the user did not set, and what we must pass on."""
    defaults = {"VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1"}
    if machine.vllm_is_for_cpu():
        defaults |= machine.cpu_defaults(order.extra)
    # Without the last one the folder we stand in comes first on the server's import path.
    passed = {report.FOLDER: str(folder), "PYTHONSAFEPATH": "1"}
    if order.api_key:
        passed["VLLM_API_KEY"] = order.api_key
    return {**defaults, **os.environ, **passed}


def _wait_until_healthy(child: subprocess.Popen[str], log: EngineLog, root: str) -> None:
    while child.poll() is None:
        try:
            with DIRECT.open(f"{root}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(POLL)
    wrong = log.misused()
    if wrong is not None:
        raise RequestError(f"vLLM refuses its arguments: {wrong}.", "What stands after `--` goes to vLLM.")
    raise ServeError(f"vLLM could not serve the model: {log.failure()}", "Its messages above say more.")
