"""Compiles a kernel's text to a cubin with NVRTC, or nvcc where that is what there is, and keeps it in a user cache."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

ARCHITECTURE = "sm_90a"
OPTIONS = (f"--gpu-architecture={ARCHITECTURE}", "--std=c++17")
NAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


def cache_folder() -> Path:
    """Return where cubins are kept: QTOOLKIT_CACHE, or XDG_CACHE_HOME/qtoolkit, or ~/.cache/qtoolkit."""
    own = os.environ.get("QTOOLKIT_CACHE")
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qtoolkit"
    return base / "cuda"


@lru_cache(maxsize=1)
def nvrtc() -> ctypes.CDLL | None:
    """Return NVIDIA's run-time compiler from the loader's path, or from the packages a CUDA build of torch installs."""
    folders = [Path(entry) / "nvidia" for entry in sys.path if entry]
    found = [str(lib) for folder in folders for lib in sorted(folder.glob("*/lib/libnvrtc.so.1[0-9]"))]
    for name in (*NAMES, *found):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        _load_builtins(library, folders)
        return library
    return None


def _load_builtins(library: ctypes.CDLL, folders: Sequence[Path]) -> None:
    """Load NVRTC's second library, which it asks for by name only: packages of 13.0 say nowhere where it lies.

    What is loaded already is found by its name. Where it lies on the loader's path, as in CUDA's own folder, there is
    nothing to do.
    """
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    name = f"libnvrtc-builtins.so.{major.value}.{minor.value}"
    for path in (path for folder in folders for path in folder.glob(f"*/lib/{name}")):
        with contextlib.suppress(OSError):  # of another processor, say; a later compilation names what it misses
            ctypes.CDLL(str(path))
            return


@lru_cache(maxsize=1)
def version() -> str | None:
    """Return the compiler that will be used, with its version; None if there is neither NVRTC nor nvcc."""
    library = nvrtc()
    if library is not None:
        major, minor = ctypes.c_int(), ctypes.c_int()
        library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        return f"nvrtc {major.value}.{minor.value}"
    if shutil.which("nvcc"):
        words = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
        return "nvcc " + words.split("release ")[1].split(",")[0]
    return None


def cubin(text: str) -> bytes:
    """Return machine code for ``text``, from the cache if it was compiled before by the same compiler.

    Raises:
        RuntimeError: there is no compiler, or it refused the text (its log follows).
    """
    compiler = version()
    if compiler is None:
        raise RuntimeError("no CUDA compiler: install nvidia-cuda-nvrtc (CUDA torch brings it) or put nvcc on PATH")
    key = hashlib.sha256("\0".join((compiler, *OPTIONS, text)).encode()).hexdigest()[:32]
    path = cache_folder() / f"{key}.cubin"
    try:
        image = path.read_bytes()
    except OSError:
        image = b""
    if not image.startswith(b"\x7fELF"):  # absent, or not what was written
        image = _nvrtc_cubin(text) if compiler.startswith("nvrtc") else _nvcc_cubin(text)
        _write(path, image)
    return image


def _write(path: Path, image: bytes) -> None:
    """Write atomically: whoever reads at the same time sees the whole file or none. A read-only home is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        with os.fdopen(handle, "wb") as file:
            file.write(image)
        os.replace(temporary, path)
    except OSError as error:
        print(f"qtoolkit: compiled kernel not kept in {path.parent}: {error}", file=sys.stderr)


def _nvrtc_cubin(text: str) -> bytes:
    library = nvrtc()
    assert library is not None  # version() said so
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    _check(library, library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"qtoolkit.cu", 0, None, None))
    options = (ctypes.c_char_p * len(OPTIONS))(*(option.encode() for option in OPTIONS))
    try:
        if library.nvrtcCompileProgram(program, len(OPTIONS), options):
            _check(library, library.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
            log = ctypes.create_string_buffer(size.value)
            _check(library, library.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"NVRTC refused a kernel:\n{log.value.decode()}")
        _check(library, library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        image = ctypes.create_string_buffer(size.value)
        _check(library, library.nvrtcGetCUBIN(program, image))
        return image.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _check(library: ctypes.CDLL, status: int) -> None:
    if status:
        raise RuntimeError(f"NVRTC: {library.nvrtcGetErrorString(status).decode()}")


def _nvcc_cubin(text: str) -> bytes:
    virtual = ARCHITECTURE.replace("sm", "compute")
    with tempfile.TemporaryDirectory() as folder:
        source, image = Path(folder) / "qtoolkit.cu", Path(folder) / "qtoolkit.cubin"
        source.write_text(text)
        target = f"-gencode=arch={virtual},code={ARCHITECTURE}"
        done = subprocess.run(
            ["nvcc", "-std=c++17", target, "-cubin", "-o", str(image), str(source)], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"nvcc refused a kernel:\n{done.stderr}")
        return image.read_bytes()
