"""Weight files that are written tensor by tensor are what safetensors reads."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qtoolkit.bridges.stream import DTYPES, Stream
from qtoolkit.source import Source


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found = {f"kind.{dtype}": (torch.rand(3, 5) * 9).to(dtype) for dtype in DTYPES}
    found |= {"scalar": torch.tensor(7), "nothing": torch.zeros(0, 4), "turned": torch.rand(4, 6).t()}
    return found | {"odd": torch.rand(3).half(), 'a "quoted" näme': torch.rand(8, 8).bfloat16()}


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype
        and found[name].shape == tensor.shape
        and found[name].contiguous().reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
        for name, tensor in expected.items()
    )


def test_safetensors_reads_every_dtype_and_odd_size(tmp_path: Path) -> None:
    expected = tensors()
    stream = Stream(tmp_path, expected)
    for name, tensor in expected.items():
        stream.add(name, tensor)
    sizes = stream.finish()
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert sizes == {"model.safetensors": (tmp_path / "model.safetensors").stat().st_size}
    assert equal(load_file(tmp_path / "model.safetensors"), expected)


def test_a_file_ends_at_its_limit_and_an_index_names_the_files(tmp_path: Path) -> None:
    expected = {f"layer.{i}": torch.full((16,), i, dtype=torch.int32) for i in range(5)}  # 64 bytes each
    expected["large"] = torch.zeros(100, dtype=torch.float32)
    stream = Stream(tmp_path, expected, limit=128)
    for name, tensor in expected.items():
        stream.add(name, tensor)
    sizes = stream.finish()
    assert list(sizes) == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 64 + 400
    assert [index["weight_map"][f"layer.{i}"][:11] for i in range(5)] == [f"model-{i:05d}" for i in (1, 1, 2, 2, 3)]
    source = Source(tmp_path, "stream")
    assert equal({name: source.read(name) for name in source.files}, expected)


def test_what_was_not_announced_is_not_written(tmp_path: Path) -> None:
    stream = Stream(tmp_path, ["short"])
    for i in range(9):
        stream.add(f"layer.{i}" * 10, torch.zeros(2))
    with pytest.raises(AssertionError, match="announced"):
        stream.finish()


def test_a_written_tensor_is_not_kept(tmp_path: Path) -> None:
    stream, tensor = Stream(tmp_path, ["first"]), torch.zeros(8)
    alive = weakref.ref(tensor)
    stream.add("first", tensor)
    del tensor
    assert alive() is None
