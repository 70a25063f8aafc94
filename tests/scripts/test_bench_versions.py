"""The timing of two versions of the CPU kernels, on layers so small that only the arithmetic counts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qtoolkit.kernels.cpu import library

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "bench_versions.py"
known = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, check=False).returncode == 0

pytestmark = [
    pytest.mark.skipif(library.failure() is not None, reason="the CPU kernels cannot be built here"),
    pytest.mark.skipif(not known, reason="this is no git checkout"),
]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_one_row_for_each_number_of_tokens_and_kind_of_scales() -> None:
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


def test_an_unknown_revision_is_named() -> None:
    done = run("no-such-revision")
    assert done.returncode != 0
    assert "no-such-revision" in done.stderr
    assert "Traceback" not in done.stderr
