"""The rounding loops under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from qtoolkit.kernels import build
from qtoolkit.kernels.cpu import library as linear
from qtoolkit.kernels.cpu.rounding import library

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-w")
PROGRAM = Path(__file__).with_name("rounding_sanitized.cpp")


@pytest.mark.slow
@pytest.mark.skipif(library.failure() is not None, reason=f"no rounding loops here: {library.failure()}")
def test_they_read_and_write_nothing_beyond_their_blocks(tmp_path: Path) -> None:
    compiler = build.compiler()
    assert compiler is not None
    probe = [compiler, *SANITIZERS, "-x", "c++", "-", "-o", str(tmp_path / "probe")]
    if subprocess.run(probe, input=b"int main() {}", capture_output=True).returncode:
        pytest.skip(f"{compiler} has no sanitizers here")
    flags = (*(flag for flag in linear.FLAGS if flag != "-O3"), "-O1", *SANITIZERS)
    objects = []
    for unit in library.units():
        objects.append(str(tmp_path / f"{unit.name}.o"))
        subprocess.run([compiler, *flags, *unit.flags, "-c", str(unit.source), "-o", objects[-1]], check=True)
    program = str(tmp_path / "sanitized")
    subprocess.run([compiler, *flags, f"-I{library.FOLDER}", str(PROGRAM), *objects, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{50 * len(library.load().paths)} runs\n"
