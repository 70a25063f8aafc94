"""Checkpoints of a small random model, and real servers started by the real command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from serving_support import KEY, PROMPT, Served, Start, descendants
from tests_support import save_random
from transformers import AutoTokenizer

import qtoolkit

START = 300  # seconds: an engine takes 30 on two quiet cores, several times that on busy ones
RTN = {"calibration.samples": 1, "calibration.length": 16}


def stop(process: subprocess.Popen[str]) -> None:
    """Ask a launcher to stop, and demand that it does so in order and leaves nothing behind."""
    family = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive, f"SIGTERM left {[child.name() for child in alive]} running"


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Start `qtoolkit serve CHECKPOINT ARGUMENTS` and wait until it is ready; stopped by SIGTERM at the end."""

    @contextmanager
    def run(
        checkpoint: Path, arguments: Sequence[str] = (), environment: dict[str, str] | None = None
    ) -> Iterator[Served]:
        messages = tmp_path_factory.mktemp("serve") / "messages.txt"
        command = [sys.executable, "-m", "qtoolkit", "serve", str(checkpoint), "--port", "0", "--json", *arguments]
        env = {**os.environ, "VLLM_API_KEY": KEY, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        with messages.open("w") as stderr:
            process = subprocess.Popen(
                command, env={**env, **(environment or {})}, stdout=subprocess.PIPE, stderr=stderr, text=True
            )
        assert process.stdout is not None
        late = time.monotonic() + START
        try:
            os.set_blocking(process.stdout.fileno(), False)
            line = ""
            while not line and process.poll() is None and time.monotonic() < late:
                line = process.stdout.readline()
                time.sleep(0.1)
            assert line, f"not ready in {START} s:\n" + "\n".join(messages.read_text().splitlines()[-40:])
            yield Served(process, json.loads(line), messages)
        finally:
            if process.poll() is None:
                stop(process)

    return run


@pytest.fixture(scope="session")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-block Llama whose every layer takes groups of 128 and splits over two ranks.

    Weights are large, so that the next token is not a toss-up and greedy texts can be compared.
    """
    return save_random(
        tmp_path_factory.mktemp("float") / "float",
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=8,
        num_key_value_heads=4,
        initializer_range=0.1,
        max_position_embeddings=512,
    )


@pytest.fixture(scope="session")
def packed(float_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its W4A8 checkpoint in groups of 128, plainly rounded."""
    folder = tmp_path_factory.mktemp("packed") / "random-w4a8"
    qtoolkit.quantize(float_model, "rtn", folder, changes=RTN)
    return folder


@pytest.fixture(scope="session")
def packed_channel(float_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its W4A8 checkpoint with one scale per output channel."""
    folder = tmp_path_factory.mktemp("packed") / "random-w4a8-channel"
    qtoolkit.quantize(float_model, "rtn", folder, changes={**RTN, "scheme.group_size": "channel"})
    return folder


@pytest.fixture(scope="session")
def tokens(packed: Path) -> list[int]:
    """A text of some hundred tokens."""
    return AutoTokenizer.from_pretrained(packed)(PROMPT * 4)["input_ids"]


@pytest.fixture(scope="session")
def server(start: Start, packed: Path) -> Iterator[Served]:
    """The one engine of the default tier: float32, so that nothing but int8 activations sets it apart from float."""
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    with start(packed, ["--", "--enforce-eager", "--dtype", "float32"]) as served:
        yield served
