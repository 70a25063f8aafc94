"""The random Llama has the shape it says, and transformers loads all three of its kinds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_random_llama.py"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "random"
    command = [sys.executable, str(SCRIPT), str(folder), "--layers", "1", "--int8", "--int4"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["", "-w8a8", "-w4a16"])
def test_transformers_loads_it_and_activations_keep_their_size(written: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = written.with_name(written.name + kind)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = tokenizer("Any text encodes: żółw", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == "Any text encodes: żółw"
    with torch.no_grad():
        logits = model(ids).logits.float()
    assert logits.shape == (1, ids.shape[1], 32000)
    assert 0.5 < logits.std() < 2  # random layers of unit gain behind a final norm
