"""Compiles C++ sources into a shared library at first use and keeps it, named by the hash of all that made it."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

COMPILERS = ("c++", "g++", "clang++")


class BuildError(RuntimeError):
    """No library could be built; the message says why in one line."""


@dataclass(frozen=True)
class Unit:
    """One object file: a source, the flags only it gets, and whether the library can do without it.

    An optional unit that the compiler does not know how to build is left out; the required ones then are compiled
    with ``-DWITHOUT_<NAME>``.
    """

    name: str
    source: Path
    flags: tuple[str, ...] = ()
    optional: bool = False


def cache_folder() -> Path:
    """Return where libraries are kept: QTOOLKIT_CACHE, or XDG_CACHE_HOME/qtoolkit, or ~/.cache/qtoolkit."""
    own = os.environ.get("QTOOLKIT_CACHE")
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qtoolkit"
    return base / "cpu"


def compiler() -> str | None:
    """Return the C++ compiler's path: $CXX when set, else the first of c++, g++, clang++ that is installed."""
    own = os.environ.get("CXX")
    return next((found for name in ((own,) if own else COMPILERS) if (found := shutil.which(name))), None)


def library(name: str, units: tuple[Unit, ...], headers: tuple[Path, ...], flags: tuple[str, ...]) -> Path:
    """Return the path of the library made of ``units``, building it when this user has not built it yet.

    Several processes may do this at once: each builds in its own folder, and the finished file is moved into place.

    Raises:
        BuildError: there is no compiler, it fails on a required unit, or the cache cannot be written.
    """
    tool = compiler()
    if tool is None:
        raise BuildError(f"no C++ compiler found (looked for {os.environ.get('CXX') or ', '.join(COMPILERS)})")
    target = cache_folder() / f"{name}-{_digest(tool, units, headers, flags)}.so"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as folder:
            os.replace(_build(tool, units, flags, Path(folder)), target)
    except OSError as error:
        raise BuildError(f"the library cannot be kept in {target.parent}: {error}") from error
    return target


def _digest(tool: str, units: tuple[Unit, ...], headers: tuple[Path, ...], flags: tuple[str, ...]) -> str:
    version = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
    seen = hashlib.sha256(repr((platform.machine(), tool, version, flags)).encode())
    for unit in units:
        seen.update(repr((unit.name, unit.flags, unit.optional)).encode() + unit.source.read_bytes())
    for header in headers:
        seen.update(header.read_bytes())
    return seen.hexdigest()[:20]


def _build(tool: str, units: tuple[Unit, ...], flags: tuple[str, ...], folder: Path) -> Path:
    def compile_one(unit: Unit, extra: tuple[str, ...] = ()) -> str:
        command = [tool, *flags, *unit.flags, *extra, "-c", str(unit.source), "-o", str(folder / f"{unit.name}.o")]
        return _failure(command)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        optional = tuple(unit for unit in units if unit.optional)
        required = tuple(unit for unit in units if not unit.optional)
        missing = {u.name for u, failed in zip(optional, pool.map(compile_one, optional), strict=True) if failed}
        without = tuple(f"-DWITHOUT_{name.upper()}" for name in sorted(missing))
        for failed in pool.map(lambda unit: compile_one(unit, without), required):
            if failed:
                raise BuildError(failed)
    objects = [str(folder / f"{unit.name}.o") for unit in units if unit.name not in missing]
    result = folder / "library.so"
    if failed := _failure([tool, *flags, "-shared", "-o", str(result), *objects]):
        raise BuildError(failed)
    return result


def _failure(command: list[str]) -> str:
    """Run a compiler; return "" or the first error it prints."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no output"]
    return f"{command[0]} failed: {lines[0]}"
