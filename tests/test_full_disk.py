"""A disk that is really full: a small file system that grows until the run fits."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests_support import save_random

import qtoolkit

CHANGES = {"calibration.samples": 2, "calibration.length": 16}
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]

RUN = """
import json, subprocess, sys
from pathlib import Path
import qtoolkit

model, disk, kept, changes = sys.argv[1], Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], check=True)
for kilobytes in [16, *range(100, 4000, 150)]:
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", disk], check=True)
    try:
        qtoolkit.quantize(model, "rtn", disk / "out", changes=changes)
    except qtoolkit.errors.QToolkitError as error:
        print(json.dumps({"said": str(error), "hint": error.hint, "finished": (disk / "out").exists()}))
    else:
        subprocess.run(["cp", "-r", disk / "out", kept], check=True)
        left = sorted(path.name for path in disk.iterdir())
        print(json.dumps({"left": left}))
        break
"""


def allowed() -> bool:
    """Tell whether this user may mount a file system of his own."""
    if shutil.which("unshare") is None:
        return False
    mount = "mount -t tmpfs -o size=16k tmpfs /mnt"
    return subprocess.run([*NAMESPACE, "sh", "-c", mount], capture_output=True).returncode == 0


@pytest.mark.skipif(not allowed(), reason="needs Linux user namespaces")
def test_a_run_on_a_full_disk_says_so_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    model = save_random(tmp_path / "model")
    qtoolkit.quantize(model, "rtn", tmp_path / "expected", changes=CHANGES)
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    done = subprocess.run(
        [*NAMESPACE, sys.executable, "-c", RUN, str(model), str(disk), str(kept), json.dumps(CHANGES)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    *failures, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(failures) >= 3  # at the first write, at a block and while the parts are put together
    for failure in failures:
        assert "disk is full" in failure["said"]
        assert "same command again" in failure["hint"]
        assert not failure["finished"]
    assert last == {"left": ["out"]}
    ours, expected = (load_file(folder / "model.safetensors") for folder in (kept, tmp_path / "expected"))
    assert ours.keys() == expected.keys()
    assert all(ours[name].equal(expected[name]) for name in ours)
