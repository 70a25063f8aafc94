"""Choosing by measurement: the divergence is the exact one, the text is held out, and outliers change the choice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests_support import save_random
from transformers import AutoModelForCausalLM

import qtoolkit
from qtoolkit import architecture, checkpoint, recipe
from qtoolkit.calibration import capture, choice, trial
from qtoolkit.errors import RequestError
from qtoolkit.source import resolve
from qtoolkit.stages import Stream

QUICK = {"calibration.samples": 8, "calibration.length": 48, "smooth.grid": 6, "scheme.group_size": 64}


@pytest.mark.parametrize("tied", [False, True])
def test_divergence_in_parts_of_the_vocabulary_is_the_exact_one(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "VOCABULARY", 100)  # 258 tokens: three parts, the last one smaller
    folder = save_random(tmp_path / "model", tie_word_embeddings=tied)
    source = resolve(folder)
    skeleton = architecture.skeleton(source)
    tokens = torch.randint(2, 258, (2, 12), generator=torch.Generator().manual_seed(0))
    stream = capture.embed(skeleton, source, tokens)
    draw = torch.Generator().manual_seed(1)
    other = Stream([x + 0.3 * torch.randn(x.shape, generator=draw) for x in stream.batches], stream.kwargs)
    with torch.device("meta"):  # a tensor that forgets its device would be made there
        found = trial.divergence(skeleton, source, stream, {"same": stream, "other": other})

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.inference_mode():
        p, q = (model.lm_head(model.model.norm(torch.cat(s.batches).double())).log_softmax(-1) for s in (stream, other))
    assert found["other"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=2e-3)  # bfloat16
    assert abs(found["same"]) < 1e-6


@pytest.mark.parametrize(("rows", "length"), [(128, 2048), (32, 256), (3, 100), (2, 64), (1, 64)])
def test_what_a_trial_is_judged_on_is_held_out(rows: int, length: int) -> None:
    tokens = torch.arange(rows * length).view(rows, length)
    fit, held = trial.split(tokens)
    assert held.numel() > 0
    assert fit.numel() >= held.numel()
    assert not set(fit.flatten().tolist()) & set(held.flatten().tolist())
    assert fit.numel() <= max(trial.FIT + length, tokens.numel() // 2)


def test_tried_blocks_lie_all_over_the_depth() -> None:
    assert trial.spread(32, 2) == [8, 24]
    assert trial.spread(3, 8) == [0, 1, 2]


@pytest.mark.parametrize(
    ("depth", "wanted", "places"),
    [(1, None, [0]), (6, None, [3]), (15, None, [7]), (16, None, [4, 12]), (80, None, [20, 60]), (6, 2, [1, 4])],
)
def test_shallow_models_try_fewer_blocks(depth: int, wanted: int | None, places: list[int]) -> None:
    assert choice.tried(depth, wanted) == places


def outliers(folder: Path, factor: float) -> Path:
    """Give three channels behind every norm the outliers that large models have; what the model computes stays."""
    file = folder / "model.safetensors"
    state = {name: tensor.float() for name, tensor in load_file(file).items()}
    for layer in range(2):
        block = f"model.layers.{layer}."
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            state[f"{block}{norm}.weight"][[3, 40, 99]] *= factor
            for reader in readers:
                state[f"{block}{reader}.weight"][:, [3, 40, 99]] /= factor
    save_file({name: tensor.bfloat16() for name, tensor in state.items()}, file, metadata={"format": "pt"})
    return folder


def test_outliers_are_treated_and_the_numbers_say_why(tmp_path: Path) -> None:
    folder = outliers(save_random(tmp_path / "model"), 64.0)
    qtoolkit.quantize(folder, "w4a8", tmp_path / "out", changes={**QUICK, "calibration.samples": 9})  # 8 are text
    found = checkpoint.verify(tmp_path / "out").choice
    assert found is not None
    assert list(found.divergence) == ["none", "smooth", "rotate", "both"]
    assert found.chosen != "none"
    assert found.divergence[found.chosen] < 0.7 * found.divergence["none"]
    assert found.held_out_tokens == 2 * 48
    assert found.blocks == ("model.layers.1",)


def test_ways_that_rounding_leaves_near_are_tried_again_with_compensation(tmp_path: Path) -> None:
    folder = outliers(save_random(tmp_path / "model"), 64.0)
    qtoolkit.quantize(folder, "w4a8", tmp_path / "out", changes=QUICK)
    found = checkpoint.verify(tmp_path / "out").choice
    assert found is not None
    assert list(found.compensated) == choice.contenders(found.divergence)
    assert found.chosen == choice.simplest(found.compensated, choice.MARGIN)
    assert all(value < found.divergence[name] for name, value in found.compensated.items())
    assert found.decisive == found.compensated


@pytest.mark.parametrize(
    ("glance", "left"),
    [
        ({"none": 1.04, "smooth": 1.0, "rotate": 1.2}, ["none"]),  # nothing to be gained
        ({"none": 1.5, "smooth": 1.0, "rotate": 2.5}, ["none", "smooth"]),  # open
        ({"none": 9.0, "smooth": 1.0, "rotate": 2.5}, ["smooth"]),  # clear
    ],
)
def test_only_ways_that_rounding_leaves_near_stay_in_question(glance: dict[str, float], left: list[str]) -> None:
    assert choice.contenders(glance) == left


@pytest.mark.parametrize(
    ("method", "steps"),
    [
        ("none", ["gptq"]),
        ("smooth", ["smooth", "gptq"]),
        ("rotate", ["rotate", "gptq"]),
        ("both", ["rotate", "smooth", "gptq"]),
        (None, ["gptq"]),
    ],
)
def test_a_forced_method_decides_the_steps_and_keeps_their_options(method: str | None, steps: list[str]) -> None:
    forced = recipe.load("rtn", {"outliers.method": method})
    assert list(forced.under(method)) == steps
    assert forced.under(method)["gptq"] == recipe.load("rtn").steps["gptq"]


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(RequestError, match=r"outliers\.method"):
        recipe.load("w4a8", {"outliers.method": "spin"})


def test_a_choice_survives_an_interruption(tmp_path: Path) -> None:
    class Stop:
        def start(self, blocks: int, done: int) -> None: ...
        def say(self, text: str) -> None: ...
        def block(self, name: str, error: float) -> None:
            raise KeyboardInterrupt

    folder = save_random(tmp_path / "model")
    qtoolkit.quantize(folder, "w4a8", tmp_path / "whole", changes=QUICK)
    with pytest.raises(KeyboardInterrupt):
        qtoolkit.quantize(folder, "w4a8", tmp_path / "out", changes=QUICK, progress=Stop())
    assert (tmp_path / "out.partial" / "choice.safetensors").is_file()
    qtoolkit.quantize(folder, "w4a8", tmp_path / "out", changes=QUICK)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
