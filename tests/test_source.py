"""A model's files: the digest sees every byte of them, and damaged weights are refused whatever is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qtoolkit import source
from qtoolkit.errors import NumericError
from qtoolkit.source import Source


def folder_with(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Write a model of one file."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.mark.parametrize("place", [0, 1000, 4095, 4096, -1])
def test_the_digest_changes_with_any_byte(place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "STRETCH", 4096)
    folder = folder_with(tmp_path / "model", {"a": torch.arange(5000.0)})
    before, again = (Source(folder, "model").digest() for _ in range(2))
    assert before == again
    assert len(before) == 12
    file = folder / "model.safetensors"
    held = bytearray(file.read_bytes())
    names = source.Source(folder, "model")
    assert names.files  # read while the header is whole
    held[place] ^= 1
    file.write_bytes(held)
    assert names.digest() != before


def test_the_digest_changes_with_the_order_of_stretches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "STRETCH", 4096)
    numbers = torch.arange(8192.0)
    one = Source(folder_with(tmp_path / "one", {"a": numbers}), "model").digest()
    other = Source(folder_with(tmp_path / "two", {"a": numbers.roll(1024)}), "model").digest()
    assert one != other


def test_nan_is_refused_in_rows_that_are_not_asked_for_and_sound_tensors_come_again(tmp_path: Path) -> None:
    bad = torch.ones(6, 4)
    bad[5, 3] = torch.nan
    model = Source(folder_with(tmp_path / "model", {"bad": bad, "good": torch.ones(2, 2)}), "model")
    for _ in range(2):
        with pytest.raises(NumericError, match="bad holds 1 values"):
            model.read_finite("bad", torch.tensor([0]))
        assert torch.equal(model.read_finite("good"), torch.ones(2, 2))
