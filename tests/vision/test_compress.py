"""`qtoolkit compress` from weights to a folder: what is loaded gives the answers that were measured."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from qtoolkit import checkpoint, cli, recipe
from qtoolkit.calibration import logs
from qtoolkit.errors import CheckpointError, RequestError
from qtoolkit.vision import data, measure, models, runtime
from qtoolkit.vision.pipeline import compress
from qtoolkit.vision.record import VisionManifest, VisionRecipe

FLOORS = {"ovsw": 0.5, "debut": 0.4, "sfp": 0.7, "cr-sfp": 0.7}  # two epochs after a large change; chance is 0.1
RECIPES = sorted(recipe.presets("vision").keys() - {"shorten"})  # which needs residual blocks
SHORT = {"calibration.samples": 64}
CHANGES = {"filters": {"filters.where": "all"}, "sfp": {"recover.where": "all"}, "cr-sfp": {"recover.where": "all"}}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_ends_in_a_folder_that_loads_and_gives_the_measured_accuracy(
    name: str, digits_weights: Path, tmp_path: Path
) -> None:
    changes = SHORT | CHANGES.get(name, {})
    if "recover" in recipe.load(name, None, VisionRecipe).steps:
        changes |= {"recover.epochs": 2, "recover.lr": 0.05, "recover.batch": 64}
    if name == "debut":
        changes |= {"debut.chains": "search", "debut.compression": 0.8, "debut.sweeps": 1}
    result = compress("digits", name, tmp_path / "out", weights=digits_weights, test="digits-test", changes=changes)
    loaded = runtime.load(tmp_path / "out")
    images = data.load("digits-test", loaded.architecture)
    assert measure.accuracy(loaded.network, images, loaded.architecture) == result.figures["accuracy_after"]
    assert result.figures["accuracy_before"] > 0.94
    assert result.figures["accuracy_after"] > FLOORS.get(name, 0.85)
    assert result.figures["multiply_adds_after"] <= result.figures["multiply_adds_before"]
    assert {layer["name"] for layer in result.layers} == {"conv2", "conv3", "conv4"}


def test_blocks_by_which_classes_get_least_apart_are_left_out(tmp_path: Path) -> None:
    model = models.resolve("cifar-resnet20")
    save_file(dict(model.network.state_dict()), tmp_path / "w.safetensors")
    x = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(40) % 10)
    changes = {"calibration.data": str(tmp_path / "x.npz"), "shorten.count": 2}
    result = compress(
        "cifar-resnet20", "shorten", tmp_path / "out", weights=tmp_path / "w.safetensors", changes=changes
    )
    manifest = checkpoint.read_manifest(tmp_path / "out")
    assert isinstance(manifest, VisionManifest)
    rows = {row.name: row.figures for row in manifest.groups if row.step == "shorten"}
    # the first blocks of stages 2 and 3 change the size, so they cannot go
    assert sorted(rows) == ["layer1.0", "layer1.1", "layer1.2", "layer2.1", "layer2.2", "layer3.1", "layer3.2"]
    gains = {name: row["modularity_behind"] - row["modularity_before"] for name, row in rows.items()}
    assert set(manifest.dropped) == set(sorted(gains, key=lambda name: gains[name])[:2])
    loaded = runtime.load(tmp_path / "out")
    assert all(isinstance(loaded.network.get_submodule(name), nn.Identity) for name in manifest.dropped)
    images = data.load(str(tmp_path / "x.npz"), model.architecture)
    assert measure.logits(loaded.network, images, model.architecture).isfinite().all()
    assert result.figures["packing_error"] < 1e-5
    assert result.figures["multiply_adds_after"] < result.figures["multiply_adds_before"]


class Stopped(Exception):
    pass


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes_and_logs(digits_weights: Path, tmp_path: Path) -> None:
    changes = {**SHORT, "recover.epochs": 3, "recover.where": "all"}

    def stop(text: str) -> None:
        if text.startswith("epoch 3"):
            raise Stopped  # before the third epoch is saved

    compress("digits", "sfp", tmp_path / "whole", weights=digits_weights, changes=changes)
    with pytest.raises(Stopped):
        compress("digits", "sfp", tmp_path / "cut", weights=digits_weights, changes=changes, say=stop)
    lines = (tmp_path / "cut.partial" / "training.csv").read_text("utf-8").splitlines()
    assert lines[0] == "epoch,loss,learning_rate,zeros"
    assert [line.split(",")[0] for line in lines[1:]] == ["1", "2"]
    said: list[str] = []
    compress("digits", "sfp", tmp_path / "cut", weights=digits_weights, changes=changes, say=said.append)
    assert "going on after epoch 2 of 3" in said
    for name in ("model.safetensors", "training.csv"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    rows = [line.split(",") for line in (tmp_path / "cut" / "training.csv").read_text("utf-8").splitlines()[1:]]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert float(rows[2][2]) < float(rows[0][2])  # the rate falls
    assert float(rows[2][3]) == pytest.approx(9 / 32)  # int(0.3 * 32) filters of every layer are zero
    assert not (tmp_path / "cut.partial").exists()


def test_tensorboard_gets_the_same_figures(digits_weights: Path, tmp_path: Path) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    changes = {**SHORT, "recover.epochs": 2, "recover.where": "all"}
    compress("digits", "sfp", tmp_path / "out", weights=digits_weights, changes=changes)
    events = loader.EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("training/loss")]
    lines = (tmp_path / "out" / "training.csv").read_text("utf-8").splitlines()[1:]
    assert found == [(int(row[0]), pytest.approx(float(row[1]))) for row in (line.split(",") for line in lines)]


def test_without_tensorboard_there_is_the_csv_file_alone(
    digits_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "find_spec", lambda name: None)
    changes = {**SHORT, "recover.epochs": 1, "recover.where": "all"}
    compress("digits", "sfp", tmp_path / "out", weights=digits_weights, changes=changes)
    assert (tmp_path / "out" / "training.csv").is_file()
    assert not (tmp_path / "out" / "tensorboard").exists()


def test_calibration_images_are_selected_as_the_recipe_says(digits_weights: Path, tmp_path: Path) -> None:
    errors = {}
    for select in ("first", "random", "kcore"):
        changes = {**SHORT, "calibration.select": select}
        result = compress("digits", "nm", tmp_path / select, weights=digits_weights, changes=changes)
        errors[select] = result.layers[0]["error"]
    assert len(set(errors.values())) == 3
    with pytest.raises(RequestError, match="kcor"):
        compress("digits", "nm", tmp_path / "x", weights=digits_weights, changes={"calibration.select": "kcor"})


def test_every_layer_says_what_it_cost_and_costs_and_how_alike_it_still_is(
    digits_weights: Path, tmp_path: Path
) -> None:
    result = compress("digits", "nm", tmp_path / "out", weights=digits_weights, changes=SHORT)
    for layer in result.layers:
        found = layer["figures"]
        assert (found["parameters_before"], found["parameters_after"]) == (9216, 4608)
        assert found["multiply_adds_after"] / found["multiply_adds_before"] == 0.5
        assert found["bytes_after"] == 4608 * 4 + 4608 * 2 // 8 + 4 * 8  # values, places, shape
        assert 0.8 < found["cka"] < 1
        assert 0.3 < found["gbs"] <= 1
        assert -0.5 < found["modularity_after"] < 1


def test_the_file_is_as_large_as_theory_says_plus_its_header(digits_weights: Path, tmp_path: Path) -> None:
    compress("digits", "nm", tmp_path / "out", weights=digits_weights, changes=SHORT)
    file = tmp_path / "out" / "model.safetensors"
    sparse = 3 * 32 * 32 * 9  # three convolutions
    state = models.resolve("digits").network.state_dict()
    other = sum(t.numel() * t.element_size() for name, t in state.items() if name not in packed_names())
    payload = sparse // 2 * 4 + sparse // 2 * 2 // 8 + 3 * 4 * 8 + other
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    assert file.stat().st_size == payload + header


def packed_names() -> set[str]:
    return {f"conv{index}.weight" for index in (2, 3, 4)}


def test_two_runs_write_the_same_bytes(digits_weights: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        changes = SHORT | {"recover.epochs": 1}
        compress("digits", "maxq", tmp_path / name, weights=digits_weights, changes=changes)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert first == second


def test_the_manifest_says_what_was_done(digits_weights: Path, tmp_path: Path) -> None:
    compress("digits", "nm", tmp_path / "out", weights=digits_weights, test="digits-test", changes=SHORT)
    manifest = checkpoint.verify(tmp_path / "out")
    assert isinstance(manifest, VisionManifest)
    assert (manifest.kind, manifest.scheme.name, manifest.packing) == ("vision", "2:4", ("nm",))
    assert {row.name for row in manifest.unquantized} == {"conv1", "linear"}
    assert all(0 < layer.error < 1 for layer in manifest.layers)


def test_damaged_folders_are_refused(digits_weights: Path, tmp_path: Path) -> None:
    compress("digits", "nm", tmp_path / "out", weights=digits_weights, changes=SHORT)
    file = tmp_path / "out" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="bytes instead of"):
        runtime.load(tmp_path / "out")
    file.write_bytes(whole.replace(b"conv2.weight_places", b"conv2.weight_plaXes"))
    with pytest.raises(CheckpointError, match=r"conv2\.weight_places"):
        runtime.load(tmp_path / "out")
    file.write_bytes(whole)
    runtime.load(tmp_path / "out")


def test_requests_that_make_no_sense_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="does not train"):
        compress("digits", "nm", tmp_path / "out")
    with pytest.raises(RequestError, match="quantize"):
        compress("digits", "w4a8", tmp_path / "out")
    with pytest.raises(RequestError, match="compress"):
        recipe.load("sfp")
    with pytest.raises(RequestError, match="masks"):
        compress("digits", "sfp", tmp_path / "out", changes={"recover.mask": "epoch"})


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ovsw", {"scheme.pattern": "2:4"}),
        ("debut", {"scheme.pattern": "binary", "debut.chains": "search", "debut.sweeps": 0}),
        ("sr-ste", {"scheme.pattern": "binary"}),
        ("sfp", {"scheme.pattern": "binary"}),
        ("filters", {"scheme.pattern": "2:4"}),
        ("nm", {"scheme.pattern": "filter"}),
    ],
)
def test_a_recipe_that_cannot_make_its_pattern_is_refused(
    name: str, changes: dict[str, object], digits_weights: Path, tmp_path: Path
) -> None:
    short = SHORT | ({"recover.epochs": 1} if "recover" in recipe.load(name, None, VisionRecipe).steps else {})
    with pytest.raises(RequestError, match=r"pattern|mask"):
        compress("digits", name, tmp_path / "out", weights=digits_weights, changes={**short, **changes})


def test_the_command_prints_one_json_object(digits_weights: Path, tmp_path: Path) -> None:
    words = ["compress", "digits", "-o", str(tmp_path / "out"), "--recipe", "nm", "--pattern", "4:8", "--json"]
    done = CliRunner().invoke(cli.app, [*words, "--weights", str(digits_weights), "--samples", "64"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["ok"], found["scheme"]) == (True, "4:8")
    assert CliRunner().invoke(cli.app, ["inspect", str(tmp_path / "out")]).exit_code == 0
    assert torch.isfinite(torch.tensor(found["figures"]["parameters_after"]))


def test_on_a_terminal_a_bar_shows_the_training_steps(tmp_path: Path) -> None:
    words = ["compress", "digits", "-o", str(tmp_path / "out"), "--recipe", "ovsw", "--epochs", "1"]
    ours, theirs = pty.openpty()
    code = "from qtoolkit.cli import main; main()"
    with subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # the terminal's end is an error when the other side has gone
            while part := os.read(ours, 1 << 16):
                shown += part
        os.close(ours)
        assert process.wait(60) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())  # without colours
    assert "epoch 1/1" in text
    assert "training" in text
    assert "10/10" in text  # 1297 images in whole batches of 128


def test_a_layer_to_keep_that_the_network_does_not_have_is_refused(digits_weights: Path, tmp_path: Path) -> None:
    settings = recipe.load("nm", SHORT, VisionRecipe).model_copy(update={"keep": ("conv2", "convv3")})
    with pytest.raises(RequestError, match="keeps 'convv3', which is no layer") as caught:
        compress("digits", settings, tmp_path / "out", weights=digits_weights)
    assert "conv3" in caught.value.hint
    assert not list(tmp_path.glob("out*"))
