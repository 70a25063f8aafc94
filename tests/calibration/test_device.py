"""Quantizing on one device: no tensor is made anywhere else, streams may wait in the host's memory, CUDA agrees."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

import qtoolkit
from qtoolkit import runtime
from qtoolkit.calibration import capture
from qtoolkit.errors import RequestError

SETTINGS: dict[str, Any] = {
    "calibration.samples": 4,
    "calibration.length": 32,
    "smooth.grid": 5,
    "scheme.group_size": 64,
    "outliers.method": "smooth",
}
EVERYTHING = [
    {},
    {"outliers.method": "rotate"},
    {"outliers.method": "auto", "outliers.blocks": 1},
    {"budget.bits": 5.0},
    {"gptq.compensate": False, "gptq.activation_order": True},
    {"gptq.activation_order": True, "gptq.starts": 1},
    {"scheme.group_size": "channel", "gptq.chained": True},
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("A text of many words, which says little and repeats itself now and then. " * 40)
    return str(file)


def weights(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.safetensors")}


@pytest.mark.parametrize("changes", EVERYTHING, ids=lambda v: ",".join(v) or "plain")
def test_no_tensor_is_made_without_saying_where(
    random_llama: Path, text: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Whatever is made on the default device has no data here, and the first look at it fails."""
    settings = {**SETTINGS, "calibration.data": text, **changes}
    with torch.device("meta"):
        qtoolkit.quantize(random_llama, "w4a8", tmp_path / "out", changes=settings, device="cpu")
    qtoolkit.quantize(random_llama, "w4a8", tmp_path / "again", changes=settings, device="cpu")
    assert weights(tmp_path / "out") == weights(tmp_path / "again")


def test_streams_that_wait_elsewhere_give_the_same_result(
    random_llama: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, "calibration.data": text}
    qtoolkit.quantize(random_llama, "w4a8", tmp_path / "here", changes=settings, device="cpu")
    monkeypatch.setattr(capture, "fits", lambda numbers, device: False)
    qtoolkit.quantize(random_llama, "w4a8", tmp_path / "there", changes=settings, device="cpu")
    assert weights(tmp_path / "here") == weights(tmp_path / "there")


def test_a_gpu_that_is_not_there_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RequestError, match="There is no cuda"):
        qtoolkit.quantize(tmp_path / "no model", "w4a8", tmp_path / "out", device="cuda")
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("changes", EVERYTHING[:2] + EVERYTHING[-1:], ids=lambda v: ",".join(v) or "plain")
@pytest.mark.parametrize("fits", [True, False])
def test_cuda_makes_the_same_checkpoint_but_for_the_last_bits(
    random_llama: Path, text: str, tmp_path: Path, changes: dict[str, Any], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums in another order change few codes, and no layer's error by more than a hundredth of it."""
    settings = {**SETTINGS, "calibration.data": text, **changes}
    monkeypatch.setattr(capture, "fits", lambda numbers, device: fits)
    errors = {}
    for device in ("cpu", "cuda"):
        result = qtoolkit.quantize(random_llama, "w4a8", tmp_path / device, changes=settings, device=device)
        errors[device] = {layer["name"]: layer["error"] for layer in result.layers}
    for name, error in errors["cpu"].items():
        assert errors["cuda"][name] == pytest.approx(error, rel=0.01)
    ids = torch.arange(2, 34).unsqueeze(0)
    logits = [runtime.load(tmp_path / device, activations=False)(ids).logits.float() for device in ("cpu", "cuda")]
    assert float((logits[0] - logits[1]).norm() / logits[0].norm()) < 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_repeats_itself_bit_for_bit(random_llama: Path, text: str, tmp_path: Path) -> None:
    settings = {**SETTINGS, "calibration.data": text}
    for name in ("one", "two"):
        qtoolkit.quantize(random_llama, "w4a8", tmp_path / name, changes=settings, device="cuda")
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
