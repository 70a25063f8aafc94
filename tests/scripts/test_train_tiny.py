"""Training the bundled model: a run that stops goes on identically, and the bundled weights know English."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train_tiny.py"
MODEL = Path(str(files("qtoolkit") / "models" / "tiny"))
WORDS = [
    "the",
    "old",
    "river",
    "of",
    "this",
    "country",
    "was",
    "a",
    "long",
    "road",
    "for",
    "every",
    "town",
    "and",
    "its",
]


def write_text(path: Path) -> None:
    """Write 400 paragraphs of 60 words each, drawn with a fixed seed: enough for one epoch of three steps."""
    draw = torch.Generator().manual_seed(0)
    picks = torch.randint(len(WORDS), (400, 60), generator=draw).tolist()
    path.write_text("\n\n".join(" ".join(WORDS[i] for i in row).capitalize() + "." for row in picks), "utf-8")


def run_training(data: Path, out: Path, *more: str) -> str:
    command = [sys.executable, str(SCRIPT), "--data", str(data), "--out", str(out), "--size", "micro", "--steps", "3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # two threads only wait for each other at this size
    done = subprocess.run([*command, "--windows", "1", *more], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the text, and `whole`: a model of micro size trained on it for three steps."""
    folder = tmp_path_factory.mktemp("training")
    write_text(folder / "text.txt")
    run_training(folder / "text.txt", folder / "whole")
    return folder


def test_a_run_that_was_stopped_ends_with_the_weights_of_one_that_was_not(trained: Path) -> None:
    assert "stopped at step 2" in run_training(trained / "text.txt", trained / "halves", "--stop-after", "2")
    assert not (trained / "halves").exists()
    run_training(trained / "text.txt", trained / "halves")
    assert (trained / "halves" / "model.safetensors").read_bytes() == (
        trained / "whole" / "model.safetensors"
    ).read_bytes()


def test_the_trained_folder_loads_and_has_a_card_that_tells_its_training(trained: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained / "whole")
    tokenizer = AutoTokenizer.from_pretrained(trained / "whole")
    card = (trained / "whole" / "README.md").read_text("utf-8")
    assert model(**tokenizer("The old river", return_tensors="pt")).logits.isfinite().all()
    assert "| training | 3 steps, 6,144 tokens" in card
    assert str(trained) not in card


@pytest.fixture(scope="module")
def tiny() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(MODEL)


def test_the_bundled_folder_takes_at_most_12_megabytes() -> None:
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 12e6


def test_every_text_starts_with_bos_and_comes_back_unchanged(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "In 1812, Mr. Grey's ship — 37 men aboard — left.\n\n\tÜber 5 °C; naïve 你好!"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_chat_starts_with_one_bos_and_generation_stops_at_the_end_of_a_turn(
    tiny: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    turns = [{"role": "user", "content": "Tell me about Washington."}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|bos|><|user|>\nTell me about Washington.<|end|>\n<|assistant|>\n"
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
    assert tiny.generation_config.eos_token_id == stops


@torch.inference_mode()
def test_the_bundled_weights_have_learned_english(
    tiny: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, shared_data: Path
) -> None:
    """159 a token was measured on this unseen text; the training text's word counts alone (a unigram model) give 1032.

    170 leaves room for other processors' rounding, none for damaged weights or those of an earlier training step.
    """
    text = (shared_data / "text" / "wikitext2_test.txt").read_text("utf-8")[:12000]
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :2048]
    loss = tiny(input_ids=ids, labels=ids).loss.item()
    assert math.exp(loss) < 170
