"""What the float network gives before every block of a run: bit for bit what it is alone, whatever stays in float."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests_support import save_random
from torch import Tensor

import qtoolkit
from qtoolkit import pipeline, recipe
from qtoolkit.calibration import capture, smoothing
from qtoolkit.recipe import Recipe
from qtoolkit.stages import Block, Stream

FEW = {"calibration.samples": 4, "calibration.length": 32, "smooth.grid": 5, "scheme.group_size": 64}
DOWN = "model.layers.0.mlp.down_proj"


def settings(method: str, *keep: str) -> Recipe:
    own = recipe.load("w4a8", {**FEW, "outliers.method": method})
    return own.model_copy(update={"keep": (*own.keep, *keep)})


def changed(folder: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    """Apply ``change`` to every tensor of a model, by name."""
    file = folder / "model.safetensors"
    tensors = {name: change(name, tensor.clone()).contiguous() for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def with_outliers(name: str, tensor: Tensor) -> Tensor:
    if "layernorm" in name:
        tensor[::16] = 60.0
    return tensor


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Write down, for every block that a run quantizes, how its float stream differs from the true one."""
    found: list[dict[str, Any]] = []
    transform = pipeline.Run._transform
    true: list[Stream] = []

    def watched(self: pipeline.Run, block: Block, stream: Stream) -> dict[str, Any]:
        batches = [stream.floats[i].clone() for i in range(len(stream.batches))]
        if not found:
            true[:] = [Stream([batch.clone() for batch in batches], stream.kwargs)]
        same = all(torch.equal(*pair) for pair in zip(batches, true[0].batches, strict=True))
        figures = transform(self, block, stream)
        alone = self._block(self.weights, len(found))
        if stream.floats_way.passed:  # the block itself computed a part of it, smoothed by then
            smoothing.fold_again(alone, block.smoothed)
        true[0] = capture.advance(alone, true[0])
        scale = max((group["figures"]["largest_scale"] for group in figures["groups"]), default=1.0)
        found.append({"same": same, "behind": stream.floats_way.behind, "scale": scale})
        return figures

    monkeypatch.setattr(pipeline.Run, "_transform", watched)
    return found


@pytest.mark.parametrize("method", ["none", "smooth", "both"])
def test_it_comes_out_of_a_block_that_is_quantized(method: str, seen: list[dict[str, Any]], tmp_path: Path) -> None:
    model = changed(save_random(tmp_path / "model", num_hidden_layers=3), with_outliers)
    qtoolkit.quantize(model, settings(method), tmp_path / "out")
    assert [each["same"] for each in seen] == [True] * 3
    assert [each["behind"] for each in seen] == [True] * 3
    assert method == "none" or seen[0]["scale"] > 1


@pytest.mark.parametrize("kept", [DOWN, "model.layers.0.self_attn.o_proj", "model.layers.0.self_attn.q_proj"])
@pytest.mark.parametrize("method", ["none", "smooth"])
def test_a_layer_that_is_kept_does_not_run_twice(
    method: str, kept: str, seen: list[dict[str, Any]], tmp_path: Path
) -> None:
    model = changed(save_random(tmp_path / "model", num_hidden_layers=3), with_outliers)
    result = qtoolkit.quantize(model, settings(method, kept), tmp_path / "out")
    assert len(result.unquantized) >= 1
    assert [each["same"] for each in seen] == [True] * 3


def test_layers_that_no_group_fits_do_not_run_twice(seen: list[dict[str, Any]], tmp_path: Path) -> None:
    model = save_random(tmp_path / "model", num_hidden_layers=3, intermediate_size=288)
    qtoolkit.quantize(model, settings("none"), tmp_path / "out")
    assert [each["same"] for each in seen] == [True] * 3
    assert not seen[0]["behind"]


def test_gains_that_float16_cannot_hold_after_smoothing_are_not_the_float_networks(
    seen: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def small(name: str, tensor: Tensor) -> Tensor:
        if "gate_proj" in name or "up_proj" in name:
            tensor *= 2.0**9
        elif "post_attention_layernorm" in name:
            tensor.fill_(2.0**-9 * (1 + 2.0**-7))
        return tensor.half()

    def found(*args: Any) -> tuple[Tensor, dict[str, float]]:
        _, _, group, largest, *_ = args
        scales = torch.ones_like(largest)
        scales[::16] = 2.0**9 if group.name == "up_and_gate" else 1.0  # 2^-18 (1 + 2^-7) is between two float16 numbers
        return scales, {"largest_scale": float(scales.max())}

    monkeypatch.setattr(smoothing.Smooth, "_search", found)
    model = changed(save_random(tmp_path / "model", num_hidden_layers=2), small)
    config = (model / "config.json").read_text().replace("bfloat16", "float16")
    (model / "config.json").write_text(config)
    qtoolkit.quantize(model, settings("smooth"), tmp_path / "out")
    assert [each["scale"] for each in seen] == [2.0**9] * 2
    assert [each["behind"] for each in seen] == [False] * 2
    assert [each["same"] for each in seen] == [True] * 2


@pytest.mark.parametrize(
    ("keep", "width"), [((), 512), ((DOWN,), 512), ((), 544)], ids=["all", "kept", "a width that no group divides"]
)
def test_a_run_that_goes_on_ends_with_the_same_bytes(
    keep: tuple[str, ...], width: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wide = {"hidden_size": 256, "intermediate_size": width}  # enough for products to be rough, and tokens, too
    for name, value in {"calibration.samples": 8, "calibration.length": 64}.items():
        monkeypatch.setitem(FEW, name, value)
    model = changed(save_random(tmp_path / "model", num_hidden_layers=3, **wide), with_outliers)
    qtoolkit.quantize(model, settings("smooth", *keep), tmp_path / "whole")
    transform, names = pipeline.Run._transform, []

    def stopping(self: pipeline.Run, block: Block, stream: Stream) -> dict[str, Any]:
        names.append(block.name)
        if len(names) == 2:
            raise KeyboardInterrupt
        return transform(self, block, stream)

    monkeypatch.setattr(pipeline.Run, "_transform", stopping)
    with pytest.raises(KeyboardInterrupt):
        qtoolkit.quantize(model, settings("smooth", *keep), tmp_path / "resumed")
    qtoolkit.quantize(model, settings("smooth", *keep), tmp_path / "resumed")
    assert names == [f"model.layers.{index}" for index in (0, 1, 1, 2)]
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole | resumed)
