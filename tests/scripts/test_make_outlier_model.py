"""The outlier variant computes the same as its model, and its activations have the outliers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests_support import save_random
from torch import Tensor, nn

import qtoolkit

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_outlier_model.py"
IDS = torch.arange(1, 49).view(1, 48)


def make(model: Path, folder: Path, *more: str) -> Path:
    command = [sys.executable, str(SCRIPT), str(model), str(folder), *more]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random Llama with grouped-query attention and biases, and its outlier variant."""
    folder = tmp_path_factory.mktemp("outliers")
    changes = {"tie_word_embeddings": request.param, "attention_bias": True, "mlp_bias": True}
    model = save_random(folder / "model", "llama", **changes)
    return model, make(model, folder / "outliers")


def largest_inputs(model: nn.Module, layer: str) -> Tensor:
    """Return the largest absolute value of every input channel of a layer on ``IDS``."""
    seen: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].abs().flatten(0, 1).amax(0))
    )
    with torch.no_grad():
        model(IDS)
    hook.remove()
    return seen[0]


def test_the_logits_keep_every_bit(pair: tuple[Path, Path]) -> None:
    plain, outliers = (qtoolkit.load(folder, dtype=torch.float32) for folder in pair)
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, outliers(IDS).logits)


@pytest.mark.parametrize(
    "layer", ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
)
def test_every_linear_layer_sees_channels_32_or_64_times_as_large(pair: tuple[Path, Path], layer: str) -> None:
    name = f"model.layers.1.{layer}"
    plain, outliers = (largest_inputs(qtoolkit.load(folder, dtype=torch.float32), name) for folder in pair)
    ratios = outliers / plain
    assert set(ratios.tolist()) <= {1.0, 32.0, 64.0}
    assert 1 <= (ratios > 1).sum() <= 0.05 * len(ratios) + 2


def test_the_same_hidden_channels_are_outliers_in_all_blocks(pair: tuple[Path, Path]) -> None:
    plain, outliers = (qtoolkit.load(folder, dtype=torch.float32) for folder in pair)
    ratios = [
        outliers.get_submodule(f"model.layers.{i}.input_layernorm").weight
        / plain.get_submodule(f"model.layers.{i}.input_layernorm").weight
        for i in range(2)
    ]
    assert torch.equal(ratios[0], ratios[1])
    assert ratios[0].max() >= 32


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not(pair: tuple[Path, Path], tmp_path: Path) -> None:
    weights = [make(pair[0], tmp_path / seed, "--seed", seed) / "model.safetensors" for seed in ("0", "1")]
    assert weights[0].read_bytes() == (pair[1] / "model.safetensors").read_bytes()
    assert weights[0].read_bytes() != weights[1].read_bytes()
    config = json.loads((tmp_path / "1" / "config.json").read_text())
    assert config == json.loads((pair[0] / "config.json").read_text())


def test_a_scale_that_would_round_the_weights_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(pair[0]), str(tmp_path / "no"), "--scales", "50"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "powers of two" in done.stderr
    assert not (tmp_path / "no").exists()
