"""The timing of two versions of the CPU kernels, on layers so small that only the arithmetic counts."""

import ctypes
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qtoolkit.kernels.cpu import library

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "bench_versions.py"


@pytest.fixture
def bench() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPT.parent))
    yield importlib.import_module(SCRIPT.stem)
    sys.path.remove(str(SCRIPT.parent))


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


class Writing:
    """Stands for a library whose results are all of one byte."""

    def __init__(self, byte: int) -> None:
        self.byte = byte

    def qtk_linear(self, *arguments: Any) -> None:
        m, n, y = arguments[5], arguments[7], arguments[-1]
        ctypes.memset(y, self.byte, m * n * 2)


def test_the_kernels_of_the_revision_are_taken_not_those_of_the_tree(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = tmp_path / "tree" / bench.KERNELS
    kernels.mkdir(parents=True)
    (kernels / "driver.cpp").write_text("of the revision")
    git(tmp_path / "tree", "init")
    git(tmp_path / "tree", "add", ".")
    git(tmp_path / "tree", "commit", "-m", "first")
    (kernels / "driver.cpp").write_text("of the tree")
    monkeypatch.setattr(bench, "ROOT", tmp_path / "tree")
    found = bench.extract("HEAD", tmp_path / "out")
    assert (found / "driver.cpp").read_text() == "of the revision"


def test_other_results_end_it(bench: ModuleType) -> None:
    layers = bench.Layers.make(128, 64, "folded", 1 << 16)
    same = [bench.Kernels(Writing(byte), 0) for byte in (1, 1)]
    assert len(layers.timed(same, 3, 1)) == 2
    other = [bench.Kernels(Writing(byte), 0) for byte in (1, 2)]
    with pytest.raises(SystemExit, match="results differ: 128x64, 3 tokens"):
        layers.timed(other, 3, 1)


@pytest.mark.skipif(library.failure() is not None, reason="the CPU kernels cannot be built here")
def test_one_row_for_each_number_of_tokens_and_kind_of_scales() -> None:
    if subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, check=False).returncode:
        pytest.skip("this is no git checkout")
    small = ["--tokens", "1", "9", "--shapes", "256x128", "128x128", "--rounds", "2", "--memory", "1", "--json"]
    done = run("HEAD", *small, "--scales", "folded", "channel", "groups")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["k"], row["scales"], row["m"]) for row in rows] == [
        (k, scales, m) for k in (256, 128) for scales in ("folded", "channel", "groups") for m in (1, 9)
    ]
    for row in rows:
        assert 0 < row["tree_us"][1] <= row["tree_us"][0] <= row["tree_us"][2]
        assert row["ratio"] == pytest.approx(row["tree_us"][0] / row["revision_us"][0])


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-revision"],
        ["HEAD", "--shapes", "100x100"],
        ["HEAD", "--shapes", "256"],
        ["HEAD", "--tokens", "0"],
        ["HEAD", "--memory", "-5"],
    ],
)
def test_bad_arguments_are_named(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode != 0
    assert arguments[-1] in done.stderr
    assert "Traceback" not in done.stderr
