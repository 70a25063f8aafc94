"""The C++ library is built once, refuses in words, forces paths by name, and shares torch's thread pool."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qtoolkit.kernels import build, selection
from qtoolkit.kernels.cpu import backend, library

needs_library = pytest.mark.skipif(library.failure() is not None, reason=f"no CPU kernels here: {library.failure()}")
PROBLEM = selection.Problem(256, 64, 128, torch.bfloat16, "cpu")
SHOW = """
import torch
from qtoolkit.kernels import selection
from qtoolkit.kernels.cpu import library
choice = selection.choose(selection.Problem(256, 64, 128, torch.bfloat16, "cpu"))
print(choice.backend.name, library.describe()["path"], choice.refused.get("cpu"), sep="|")
"""


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def load_anew(monkeypatch: pytest.MonkeyPatch, **environment: str) -> library.Library:
    """Build and load as a fresh process with these variables would."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return library.load.__wrapped__()


def write_script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@needs_library
@pytest.mark.parametrize("path", library.load().paths if library.failure() is None else ())
def test_the_variable_forces_a_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_anew(monkeypatch, QTOOLKIT_CPU_PATH=path).path == path


@needs_library
def test_an_unknown_path_is_refused_with_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(build.BuildError, match=r"QTOOLKIT_CPU_PATH=mmx is no path of this CPU; it has .*portable"):
        load_anew(monkeypatch, QTOOLKIT_CPU_PATH="mmx")


def test_without_a_compiler_the_reference_runs_and_the_reason_is_said(tmp_path: Path) -> None:
    name, path, reason = run_python(SHOW, CXX="no-such-compiler", QTOOLKIT_CACHE=str(tmp_path)).split("|")
    assert (name, path) == ("reference", "None")
    assert reason == "no C++ compiler found (looked for no-such-compiler)"


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = write_script(tmp_path / "cxx", "echo 'fatal error: nothing works' >&2\nexit 1")
    with pytest.raises(build.BuildError, match="fatal error: nothing works"):
        load_anew(monkeypatch, CXX=broken, QTOOLKIT_CACHE=str(tmp_path))


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(build.BuildError, match="cannot be kept in"):
        load_anew(monkeypatch, QTOOLKIT_CACHE=str(file))


@needs_library
def test_an_instruction_set_the_compiler_does_not_know_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complain = 'case "$*" in *mavxvnni*) echo "error: what is -mavxvnni" >&2; exit 1;; esac'
    old = write_script(tmp_path / "cxx", f'{complain}\nexec {build.compiler()} "$@"')
    paths = load_anew(monkeypatch, CXX=old, QTOOLKIT_CACHE=str(tmp_path)).paths
    assert list(paths) == [path for path in library.load().paths if path != "avxvnni"]


@needs_library
def test_the_library_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_anew(monkeypatch, QTOOLKIT_CACHE=str(tmp_path)).file
    made = first.stat().st_mtime_ns
    assert load_anew(monkeypatch).file == first
    assert first.stat().st_mtime_ns == made
    assert list((tmp_path / "cpu").iterdir()) == [first]


@needs_library
def test_no_second_thread_pool_appears() -> None:
    code = """
import os, torch
from qtoolkit.kernels import selection, ops
torch.set_num_threads(2)
torch.randn(512, 512) @ torch.randn(512, 512)
torch.ones(1 << 20).exp()
before = len(os.listdir("/proc/self/task"))
problem = selection.Problem(512, 512, -1, torch.bfloat16, "cpu")
p = selection.prepare(torch.zeros(512, 64, dtype=torch.int32), torch.ones(512, 1), problem)
for m in (1, 100):
    ops.w4a8_linear(torch.randn(m, 512).bfloat16(), p.weight, p.scales, None, 512, -1, p.layout)
loaded = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rsplit("/", 1)[-1]}
print(len(os.listdir("/proc/self/task")) - before, len(loaded))
"""
    assert run_python(code).split() == ["0", "1"]


def test_refusals_are_in_words() -> None:
    assert "CPUs only" in str(backend.refuse(selection.Problem(64, 64, -1, torch.bfloat16, "cuda")))
    assert "float64" in str(backend.refuse(selection.Problem(64, 64, -1, torch.float64, "cpu")))
    assert "multiple of 4" in str(backend.refuse(selection.Problem(64, 64, 6, torch.bfloat16, "cpu")))
    assert "131072" in str(backend.refuse(selection.Problem(1 << 18, 64, -1, torch.bfloat16, "cpu")))


@needs_library
def test_tensors_of_another_shape_are_refused_before_any_kernel_runs() -> None:
    packed, scales = torch.zeros(64, 32, dtype=torch.int32), torch.ones(64, 2)
    with pytest.raises(ValueError, match="packed weight"):
        backend.prepare(packed[:, 1:], scales, PROBLEM)
    with pytest.raises(ValueError, match="scales"):
        backend.prepare(packed, scales[:, 1:], PROBLEM)
    weight, own = backend.prepare(packed, scales, PROBLEM)
    with pytest.raises(ValueError, match="260 inputs"):
        backend.run(torch.ones(1, 260), weight, own, None, 64, 128)
    with pytest.raises(ValueError, match="65 outputs"):
        backend.run(torch.ones(1, 256), weight, own, None, 65, 128)
    with pytest.raises(ValueError, match="bias"):
        backend.run(torch.ones(1, 256), weight, own, torch.ones(63), 64, 128)
    with pytest.raises(ValueError, match="float64"):
        backend.run(torch.ones(1, 256, dtype=torch.float64), weight, own, None, 64, 128)
