"""`qtoolkit eval` of an image classifier: figures are those of the networks, the report shows them, bounds hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner
from vision_support import save

from qtoolkit import cli
from qtoolkit.errors import RequestError
from qtoolkit.evals import report, vision
from qtoolkit.vision import data, measure, models, runtime
from qtoolkit.vision.pipeline import compress


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained digits classifier, trained for two epochs under filter pruning: weights.safetensors beside it."""
    place = tmp_path_factory.mktemp("evaluated")
    save_file(dict(models.resolve("digits").network.state_dict()), place / "weights.safetensors")
    changes = {"recover.epochs": 2, "recover.where": "all", "recover.lr": 0.05}
    compress("digits", "sfp", place / "out", weights=place / "weights.safetensors", test="digits-test", changes=changes)
    return place


def silent(text: str) -> None:
    """Say nothing."""


def test_accuracy_and_its_paired_change_are_those_of_the_two_networks(folder: Path) -> None:
    weights = str(folder / "weights.safetensors")
    found = vision.evaluate(folder / "out", test="digits-test", reference=weights, latency=False, say=silent).accuracy
    assert found is not None
    loaded, dense = runtime.load(folder / "out"), models.resolve("digits", weights)
    images = data.load("digits-test", loaded.architecture)
    answers = [measure.logits(n, images, dense.architecture).argmax(dim=1) for n in (loaded.network, dense.network)]
    right = [(answer == images.y).double().numpy() for answer in answers]
    assert (found.value, found.before) == pytest.approx((right[0].mean(), right[1].mean()))
    assert found.change == pytest.approx(right[0].mean() - right[1].mean())
    assert found.change_error == pytest.approx(np.std(right[0] - right[1], ddof=1) / len(images) ** 0.5)
    assert found.agreement == pytest.approx(float((answers[0] == answers[1]).double().mean()))


def test_without_images_the_accuracy_of_the_compression_is_told(folder: Path) -> None:
    result = vision.evaluate(folder / "out", latency=False, say=silent)
    assert result.accuracy is not None
    assert result.accuracy.value == result.manifest.figures["accuracy_after"]
    assert result.accuracy.change_error is None
    with pytest.raises(RequestError, match="images"):
        vision.evaluate(folder / "out", reference="x", say=silent)


def test_times_are_of_every_layer_in_both_networks(folder: Path) -> None:
    result = vision.evaluate(folder / "out", say=silent)
    assert [timing.batch for timing in result.timings] == list(vision.BATCHES)
    assert set(result.layer_seconds) == {"conv2", "conv3", "conv4"}
    assert all(seconds > 0 for both in result.layer_seconds.values() for seconds in both)


def test_the_report_has_every_layer_epoch_and_reason(folder: Path, tmp_path: Path) -> None:
    result = vision.evaluate(folder / "out", say=silent)
    written = report.write(result, report.prepare(tmp_path / "report"))
    assert [path.name for path in written] == ["report.json", "report.md", "report.html"]
    assert vision.VisionResult.model_validate_json(written[0].read_text("utf-8")).manifest == result.manifest
    text, page = written[1].read_text("utf-8"), written[2].read_text("utf-8")
    for words in (
        "conv2",
        "the architecture keeps it",
        "Training",
        "modularity",
        "multiply-adds",
        "time, batch 1",
        "Packed layers run on: torch (3)",
    ):
        assert words in text
    drawn = ("Multiply-adds of each layer", "Time of each layer", "(CKA)", "(GBS)", "Training loss", "What is left")
    for words in drawn:
        assert words in page
    assert page.count("<svg") == 7
    assert "http" not in page.replace("http://www.w3.org", "")


def test_the_command_prints_writes_and_fails_where_a_bound_is_broken(folder: Path, tmp_path: Path) -> None:
    words = ["eval", str(folder / "out"), "--test", "digits-test", "-o", str(tmp_path / "report")]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    assert "Cost" in done.stdout
    assert (tmp_path / "report" / "report.html").is_file()
    failed = CliRunner().invoke(cli.app, [*words, "--json", "--fail-above", "loss=0.0"])
    assert failed.exit_code == 3
    assert "loss is" in json.loads(failed.stdout)["error"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--ppl", "sample"], "no text"),
        (["--tasks", "piqa"], "no text"),
        (["--device", "cuda"], "language models"),
        (["--fail-above", "los=0"], "los"),
    ],
)
def test_what_makes_no_sense_for_images_is_refused(folder: Path, words: list[str], error: str) -> None:
    done = CliRunner().invoke(cli.app, ["eval", str(folder / "out"), *words])
    assert isinstance(done.exception, RequestError)
    assert error in done.exception.message


def test_a_transformers_classifier_is_compared_with_its_own_folder(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(20) % 10)
    model, images = str(save("vit", tmp_path / "model")), str(tmp_path / "x.npz")
    options: dict[str, Any] = {"changes": {"calibration.data": images}}
    compress(model, "nm", tmp_path / "out", **options)
    result = vision.evaluate(tmp_path / "out", test=images, reference=model, say=silent)
    assert result.accuracy is not None
    assert result.accuracy.agreement is not None
    assert torch.isfinite(torch.tensor([v for both in result.layer_seconds.values() for v in both])).all()
    assert "vit" in report.write(result, report.prepare(tmp_path / "report"))[1].read_text("utf-8")
