"""The README of a folder names all that lives there, and nothing that does not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("qtoolkit", "kernels", "calibration", "serve", "evals", "scripts", "tests")
CODE = {".py", ".cpp", ".h", ".cu", ".cuh", ".sh"}
MIRRORED = "tests"  # its subfolders mirror the package, and so do its test files


def readmes() -> list[Path]:
    """Return every folder README of the code."""
    found = [path for stage in STAGES for path in sorted((ROOT / stage).rglob("README.md"))]
    return [path for path in found if not any(part.is_symlink() for part in path.parents)]


def inhabitants(folder: Path) -> Iterator[str]:
    """Yield the names of the files of code in ``folder`` and of the folders that have no README of their own."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or path.name.startswith(("_", ".")) or path.name == "build":
            continue
        if path.is_file() and path.suffix in CODE and not path.name.startswith(("test_", "conftest")):
            yield path.name
        if path.is_dir() and folder.name != MIRRORED and any(child.suffix in CODE for child in path.iterdir()):
            yield path.name


@pytest.mark.parametrize("readme", readmes(), ids=lambda path: str(path.relative_to(ROOT).parent))
def test_every_file_of_code_is_named(readme: Path) -> None:
    words = set(re.findall(r"[\w.]+", readme.read_text("utf-8")))
    assert [name for name in inhabitants(readme.parent) if not {name, name.removesuffix(".py")} & words] == []


@pytest.mark.parametrize("readme", readmes(), ids=lambda path: str(path.relative_to(ROOT).parent))
def test_every_file_of_code_that_a_table_names_is_there(readme: Path) -> None:
    firsts = re.findall(r"^\| (`[^|]+`) \|", readme.read_text("utf-8"), re.MULTILINE)
    named = {name for cell in firsts for name in re.findall(r"`([\w/]+\.(?:py|sh|cpp|cu|h|cuh))\b", cell)}
    assert {name for name in named if not list(readme.parent.rglob(name))} == set()
