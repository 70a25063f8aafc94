"""The package as users get it: a wheel built from the sdist, outside the checkout, with everything in it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = (".py", ".yaml", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".jinja", ".txt", ".safetensors", ".json", ".typed")
STAGES = ("kernels", "calibration", "serve", "evals")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build sdist and wheel from a copy of what git tracks, so that no file left lying about helps."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if files.returncode != 0:
        pytest.skip("not a git checkout")
    for name in filter(None, files.stdout.split("\0")):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to(os.readlink(ROOT / name))
        elif (ROOT / name).is_file():
            target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(source)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = (folder / "dist").glob("*.whl")
    return built


def tracked() -> set[str]:
    """Return, under its name in the installed package, every tracked file of the package that must ship."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    found = set()
    for name in files:
        if name.endswith(SHIPPED) and not (ROOT / name).is_symlink():
            if name.startswith("qtoolkit/"):
                found.add(name)
            elif name.split("/")[0] in STAGES:
                found.add(f"qtoolkit/{name}")
    return found


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert not tracked() - inside
    assert not {name for name in inside if name.startswith(("kernels/", "serve/", "tests/"))}


def test_the_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    script = (
        "import qtoolkit, qtoolkit.kernels.ops, qtoolkit.serve.vllm_plugin, sys\n"
        "from pathlib import Path\n"
        f"assert Path(qtoolkit.__file__).is_relative_to({str(tmp_path)!r}), qtoolkit.__file__\n"
        "from qtoolkit import recipe, architecture, source\n"
        "assert 'w4a8' in recipe.presets() and 'llama' in architecture.table()\n"
        "quick = {'calibration.samples': 2, 'calibration.length': 64}\n"
        "result = qtoolkit.quantize('tiny', 'rtn', 'out', changes=quick)\n"
        "assert len(result.layers) == 42, len(result.layers)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_metadata_names_the_command_and_the_plugin(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    entry = next(name for name in names if name.endswith("entry_points.txt"))
    text = zipfile.ZipFile(wheel).read(entry).decode()
    assert "qtoolkit = qtoolkit.cli:main" in text
    assert "qtoolkit = qtoolkit.serve.vllm_plugin:register" in text
