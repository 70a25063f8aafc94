"""Virtual environments of the peers, and running one of them in its own, with the reason in words where it cannot."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from importlib import import_module
from pathlib import Path

from quality_peers.contract import FIGURES, WEIGHTS, Job

HERE = Path(__file__).resolve().parent
LOG, STAMP = "log.txt", "installed.txt"
OWN_PARTS = ("architectures", "calibration", "kernels", "models", "packing")  # of the package, where quantizing happens
OWN_KINDS = {".py", ".yaml", ".cpp", ".h"}


class PeerError(Exception):
    """A peer cannot run; the message is the reason, fit for a table."""


def python(module: str, venvs: Path) -> Path:
    """Return the interpreter that runs the peer file ``module``.

    Raises:
        PeerError: its environment has not been installed.
    """
    wanted = requirements(module)
    if not wanted:
        return Path(sys.executable)
    stamp = venvs / module / STAMP
    if not stamp.is_file() or stamp.read_text().split() != list(wanted):
        raise PeerError(f"not installed: --install {module}")
    return _interpreter(venvs / module)


def install(module: str, venvs: Path) -> None:
    """Make the environment of the peer file ``module``, or complete it.

    Raises:
        PeerError: pip cannot install it; the last line of pip's log is the reason.
    """
    wanted, folder = requirements(module), venvs / module
    if not wanted:
        return
    if not _interpreter(folder).exists():
        venv.create(folder, with_pip=True)
    log = folder / LOG
    torch = [each for each in wanted if each.startswith("torch==")]  # first: builds from source need it
    for packages in filter(None, (torch, list(wanted))):
        command = [str(_interpreter(folder)), "-m", "pip", "install", "--no-compile", *packages]
        with log.open("w") as out:
            if subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, cwd=folder).returncode:
                raise PeerError(f"pip: {_last_line(log)}")
    (folder / STAMP).write_text("\n".join(wanted))


def run(job: Job, folder: Path, venvs: Path) -> None:
    """Do ``job`` in the peer's environment, in a process of its own; the result lies in ``folder``.

    Raises:
        PeerError: the process failed; the last line it wrote is the reason, its whole log lies in the folder.
    """
    interpreter = python(job.module, venvs)
    folder.mkdir(parents=True, exist_ok=True)
    job.write(folder)
    environment = os.environ | {
        "PYTHONPATH": str(HERE.parent), "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [str(interpreter), "-P", "-m", "quality_peers.run", str(folder.resolve())]
    log = folder / LOG
    with log.open("w") as out:
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, cwd=folder, env=environment).returncode
    if code or not (folder / FIGURES).is_file() or not (folder / WEIGHTS).is_file():
        raise PeerError(_last_line(log) if code > 0 else f"ended by signal {-code}")


def requirements(module: str) -> tuple[str, ...]:
    """Return what pip installs for the peer file ``module``; nothing for those that run in this environment."""
    return tuple(import_module(f"quality_peers.{module}").REQUIRES)


def own_code(module: str) -> str:
    """Return a digest of the code whose change makes a stored result stale: the peer file, and for ours the package."""
    state = hashlib.sha256((HERE / f"{module}.py").read_bytes())
    if module == "ours":
        import qtoolkit

        root = Path(qtoolkit.__file__).parent
        parts = [*root.glob("*.py"), *(path for part in OWN_PARTS for path in (root / part).rglob("*"))]
        for path in sorted(path for path in parts if path.suffix in OWN_KINDS):
            state.update(path.read_bytes())
    return state.hexdigest()[:12]


def _interpreter(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it said nothing"
