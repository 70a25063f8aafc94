"""README's blocks are run as they stand, and what they print must look as README says, figures aside."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:e-?\d+)?")
DURATION = re.compile(r"(?:# h )?(?:# min )?# s\b")
SIZE = re.compile(r"# (?:B|kB|MB|GB)\b")


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of ``language``."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def shape(text: str) -> str:
    """Return ``text`` with figures, durations, sizes and column widths made alike."""
    masked = SIZE.sub("# size", DURATION.sub("# time", NUMBER.sub("#", text)))
    return "\n".join(re.sub(r"[-─ ]{2,}|\s+", " ", line).strip() for line in masked.strip().splitlines())


def transcript() -> list[tuple[str, str]]:
    """Return (command, output) of every console block that shows real output."""
    found = []
    for block in blocks("console"):
        command, _, output = block.partition("\n")
        if output.strip() and not output.startswith("$"):
            found.append((command.removeprefix("$ "), output))
    return found


def test_the_transcripts_are_what_the_commands_print(tmp_path: Path) -> None:
    assert len(transcript()) >= 3
    for command, output in transcript():
        done = subprocess.run(
            f"{Path(sys.executable).parent}/{command} 2>&1", shell=True, cwd=tmp_path, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        assert shape(done.stdout.replace(str(tmp_path) + "/", "")) == shape(output), command


@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks_run(block: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_shell_blocks_name_scripts_that_exist() -> None:
    scripts = re.findall(r"bash (scripts/\S+)", "\n".join(blocks("bash")))
    assert {"scripts/quickstart.sh", "scripts/test.sh"} <= set(scripts)
    for script in scripts:
        assert (ROOT / script).is_file()


def test_links_point_to_files_that_exist() -> None:
    for page in ROOT.glob("**/README.md"):
        if ".venv" in page.parts or any(parent.is_symlink() for parent in page.parents):
            continue
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
            assert (page.parent / link).exists(), f"{page.relative_to(ROOT)} links to {link}"
