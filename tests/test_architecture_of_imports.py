"""Who may import whom, read from the imports themselves."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("kernels", "calibration", "serve", "evals")

# importer -> what it must never import; "qtoolkit" stands for the core outside the stage folders
FORBIDDEN = {
    "kernels": {"qtoolkit", "calibration", "serve", "evals", "transformers", "vllm"},
    "calibration": {"kernels", "serve", "evals", "cli", "vllm"},
    "serve": {"calibration", "cli", "evals"},
    "evals": {"calibration", "cli"},
    "core": {"serve", "evals", "cli", "vllm", "lm_eval"},
}
ONLY_IN = {"vllm": "vllm_", "lm_eval": "tasks"}  # package -> the files whose name starts so may import it


def python_files() -> list[tuple[str, Path]]:
    """Return (part, file) of every source file."""
    found = [(stage, path) for stage in STAGES for path in sorted((ROOT / stage).rglob("*.py"))]
    for path in sorted((ROOT / "qtoolkit").rglob("*.py")):
        inside = path.relative_to(ROOT / "qtoolkit").parts
        if inside[0] not in STAGES:
            found.append(("cli" if inside[0] in ("cli", "__main__.py") else "core", path))
    return found


def imported(path: Path) -> set[str]:
    """Return the dotted names a file imports anywhere, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part_of(name: str) -> str:
    """Return which part of the project, or which package, a dotted name belongs to."""
    words = name.split(".")
    if words[0] != "qtoolkit":
        return words[0]
    second = words[1] if len(words) > 1 else ""
    return second if second in (*STAGES, "cli") else "qtoolkit"


@pytest.mark.parametrize(("part", "path"), python_files(), ids=lambda value: str(getattr(value, "name", value)))
def test_every_import_is_allowed(part: str, path: Path) -> None:
    forbidden = FORBIDDEN.get(part, set())
    wrong = sorted(name for name in imported(path) if part_of(name) in forbidden)
    assert not wrong, f"{path.relative_to(ROOT)} ({part}) must not import {', '.join(wrong)}"


@pytest.mark.parametrize("package", sorted(ONLY_IN))
def test_a_heavy_package_is_imported_in_its_own_files_only(package: str) -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for _, path in python_files()
        if any(part_of(name) == package for name in imported(path)) and not path.name.startswith(ONLY_IN[package])
    ]
    assert not wrong, f"{package} is imported by {', '.join(wrong)}"


def test_importing_qtoolkit_and_asking_for_help_load_nothing_heavy() -> None:
    script = (
        "import sys, os; before = dict(os.environ)\n"
        "import qtoolkit, qtoolkit.recipe, qtoolkit.registry, qtoolkit.stages, qtoolkit.cli\n"
        "heavy = {'torch', 'transformers', 'vllm', 'datasets', 'lm_eval', 'numpy', 'matplotlib', 'triton'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
        "assert before == dict(os.environ)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("script", "error"),
    [("import transformers.activations", ""), ("from kernels import get_kernel", "hides the package 'kernels'")],
)
def test_from_the_repository_root_transformers_works_and_the_hidden_package_is_named(script: str, error: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (not error)
    assert error in done.stderr
