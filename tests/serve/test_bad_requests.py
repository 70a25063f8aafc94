"""What cannot be served is refused in one sentence, with the right exit code, and early where possible."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from serving_support import rewrite

OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


def refusal(checkpoint: Path | str, *arguments: str, **environment: str) -> tuple[int, str]:
    """Run `qtoolkit serve --json`, which must fail; return exit code and message."""
    done = subprocess.run(
        [sys.executable, "-m", "qtoolkit", "serve", str(checkpoint), "--json", *arguments],
        env={**os.environ, **OFFLINE, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    (line,) = done.stdout.splitlines()
    answer = json.loads(line)
    assert answer["ok"] is False
    assert "Traceback" not in done.stderr.splitlines()[-2]
    return done.returncode, answer["error"]


def test_a_port_in_use_is_refused_before_anything_starts(packed: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert refusal(packed, "--port", str(port)) == (2, f"Port {port} on 127.0.0.1 is in use.")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engine", "nope"], "There is no engine 'nope'"),
        (["--", "--port", "1"], "--port cannot be passed on to vLLM"),
        (["--engine", "transformers", "--port", "0", "--", "-tp", "2"], "-tp is an option of vLLM"),
    ],
)
def test_wrong_options_are_refused(packed: Path, arguments: Sequence[str], words: str) -> None:
    code, message = refusal(packed, *arguments)
    assert (code, words in message) == (2, True), message


def test_an_unknown_mode_is_refused(packed: Path) -> None:
    assert refusal(packed, QTOOLKIT_W4A8="maybe") == (2, "QTOOLKIT_W4A8=maybe is not known.")


def test_a_missing_folder_is_refused() -> None:
    code, message = refusal("./nowhere")
    assert (code, "nowhere" in message) == (2, True), message


def test_a_truncated_weight_file_is_refused(packed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(packed, folder)
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    code, message = refusal(folder, "--port", "0")
    assert (code, weights.name in message) == (1, True), message


def test_a_model_that_vllm_cannot_load_is_refused_in_vllms_own_words(packed: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    folder = rewrite(packed, tmp_path / "broken", {"quant_method": "unheard-of"}, lambda layer: dict(layer))
    code, message = refusal(folder, "--port", "0")
    assert code == 1
    assert message.startswith("vLLM could not serve the model: ")
    assert "unheard-of" in message


@pytest.mark.slow
def test_arguments_that_vllm_does_not_know_are_a_wrong_request(packed: Path) -> None:
    pytest.importorskip("vllm")
    code, message = refusal(packed, "--port", "0", "--", "--no-such-option")
    assert (code, "--no-such-option" in message) == (2, True), message
