"""Files joined byte by byte hold what safetensors itself would have written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtoolkit import shards


def made(folder: Path) -> tuple[list[Path], dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    first = {
        "b.codes": torch.randint(-9, 9, (5, 3), dtype=torch.int8, generator=draw),
        "b.scale": torch.randn(5, 1, generator=draw).bfloat16(),
        "b.empty": torch.empty(0, 4),
    }
    second = {
        "a.words": torch.randint(-9, 9, (3, 2), dtype=torch.int32, generator=draw),
        "a.shape": torch.tensor([3, 16]),
        "a.ä": torch.randn((), generator=draw),
    }
    files = [folder / "first.safetensors", folder / "second.safetensors"]
    for file, part in zip(files, (first, second), strict=True):
        save_file(part, file, metadata={"format": "pt", "facts": "{}"})
    return files, first | second


def test_all_tensors_are_there_under_their_new_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "CHUNK", 7)
    files, tensors = made(tmp_path)
    names = shards.join(files, tmp_path / "joined.safetensors", lambda name: f"model.{name}")
    found = load_file(tmp_path / "joined.safetensors")
    assert sorted(names) == sorted(found) == sorted(f"model.{name}" for name in tensors)
    for name, tensor in tensors.items():
        assert torch.equal(found[f"model.{name}"], tensor)
        assert found[f"model.{name}"].dtype == tensor.dtype


def test_wide_numbers_begin_where_their_width_asks(tmp_path: Path) -> None:
    files, _ = made(tmp_path)
    shards.join(files, tmp_path / "joined.safetensors", str)
    for name, tensor in shards.tensors(tmp_path / "joined.safetensors"):
        assert tensor.start % tensor.width == 0, name


def test_a_file_that_ends_early_is_an_error(tmp_path: Path) -> None:
    files, _ = made(tmp_path)
    files[0].write_bytes(files[0].read_bytes()[:-1])
    with pytest.raises(OSError, match="ends early"):
        shards.join(files, tmp_path / "joined.safetensors", str)
