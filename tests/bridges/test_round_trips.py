"""Our own checkpoint through every layout and back: the same bytes, the same logits, the same words."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests_support import save_random

import qtoolkit
from qtoolkit import checkpoint
from qtoolkit.bridges import convert
from qtoolkit.bridges.stream import Stream
from qtoolkit.errors import RequestError

PROMPT = torch.tensor([[1, 17, 230, 900, 45, 3, 2048, 77]])


@torch.inference_mode()
def logits(folder: Path) -> torch.Tensor:
    """Return what our own runtime computes."""
    model: Any = qtoolkit.load(folder)
    return model(PROMPT).logits


def config(folder: Path) -> dict[str, Any]:
    """Return a folder's config.json."""
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("layout", ["gptq", "qqq", "int8"])
def test_there_and_back_gives_the_same_tensors_logits_and_config(layout: str, tiny: Path, tmp_path: Path) -> None:
    there, back = tmp_path / layout, tmp_path / "int4"
    found = qtoolkit.convert(tiny, there, layout)
    assert (found.layout_before, found.layout, found.scale_error) == ("int4", layout, 0.0)
    assert checkpoint.verify(there).packing == (layout,)
    qtoolkit.convert(there, back, "int4")
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny, back))
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert config(back) == config(tiny)
    expected = logits(tiny)
    assert torch.equal(logits(there), expected)
    assert torch.equal(logits(back), expected)
    assert {path.name for path in there.iterdir()} == {path.name for path in tiny.iterdir()}


def test_the_manifest_says_where_the_checkpoint_has_been(tiny: Path, tmp_path: Path) -> None:
    qtoolkit.convert(tiny, tmp_path / "gptq", "gptq")
    qtoolkit.convert(tmp_path / "gptq", tmp_path / "int8", "int8")
    first, last = checkpoint.verify(tiny), checkpoint.verify(tmp_path / "int8")
    assert [step.layout for step in last.converted] == ["int4", "gptq"]
    assert [step.source for step in last.converted] == [str(tiny), str(tmp_path / "gptq")]
    changed = {"packing", "converted", "bytes_after", "files"}
    assert last.model_dump(exclude=changed) == first.model_dump(exclude=changed)


def test_two_conversions_write_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        qtoolkit.convert(tiny, tmp_path / name, "qqq")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_several_files_with_an_index_go_in_and_out(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "Stream", partial(Stream, limit=10**6))
    for source, layout in ((tiny, "gptq"), (tmp_path / "gptq", "int4")):
        qtoolkit.convert(source, tmp_path / layout, layout)
        index = json.loads((tmp_path / layout / "model.safetensors.index.json").read_text())
        files = set(index["weight_map"].values())
        assert len(files) >= 4
        assert files == set(checkpoint.verify(tmp_path / layout).files)
    assert torch.equal(logits(tmp_path / "int4"), logits(tiny))


def test_the_configs_are_what_engines_read(tiny: Path, tmp_path: Path) -> None:
    for layout in ("gptq", "qqq", "int8"):
        qtoolkit.convert(tiny, tmp_path / layout, layout)
    assert config(tmp_path / "qqq")["quantization_config"] == {"quant_method": "qqq", "wbits": 4, "group_size": 128}
    gptq = config(tmp_path / "gptq")["quantization_config"]
    wanted = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "lm_head": False}
    assert gptq.items() >= wanted.items()
    int8 = config(tmp_path / "int8")["quantization_config"]
    assert int8["format"] == "int-quantized"
    assert int8["config_groups"]["group_0"]["weights"]["num_bits"] == 4
    assert int8["ignore"] == ["lm_head"]


def test_stock_transformers_computes_the_same_from_int4_and_int8(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    qtoolkit.convert(tiny, tmp_path / "int8", "int8")
    with torch.inference_mode():
        int4, int8 = (
            AutoModelForCausalLM.from_pretrained(folder)(PROMPT).logits for folder in (tiny, tmp_path / "int8")
        )
    assert torch.equal(int4, int8)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A size budget's checkpoint: int4 and int8 layers side by side."""
    folder = tmp_path_factory.mktemp("mixed")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = save_random(folder / "float", **sizes, initializer_range=0.1)
    changes = {"calibration.samples": 2, "calibration.length": 32, "budget.bits": 6.0}
    qtoolkit.quantize(model, "rtn", folder / "int4", changes=changes)
    return folder / "int4"


def test_int8_layers_beside_int4_stay_int8(mixed: Path, tmp_path: Path) -> None:
    kinds = {layer.scheme for layer in checkpoint.verify(mixed).layers}
    assert kinds == {"W4A8-g128", "W8A8-channel"}
    qtoolkit.convert(mixed, tmp_path / "int8", "int8")
    qtoolkit.convert(tmp_path / "int8", tmp_path / "int4", "int4")
    assert checkpoint.verify(tmp_path / "int4").packing == ("int4", "int8")
    before, after = (load_file(folder / "model.safetensors") for folder in (mixed, tmp_path / "int4"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    old, new = (config(folder)["quantization_config"] for folder in (mixed, tmp_path / "int4"))
    assert sorted(new.pop("ignore")) == sorted(old.pop("ignore"))  # the order says nothing
    assert new == old
    prompt = PROMPT % 256
    with torch.inference_mode():
        models: list[Any] = [qtoolkit.load(folder) for folder in (mixed, tmp_path / "int8", tmp_path / "int4")]
        answers = [model(prompt).logits for model in models]
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


@pytest.mark.parametrize("layout", ["gptq", "qqq"])
def test_a_layout_of_one_scheme_refuses_two(layout: str, mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="one scheme"):
        qtoolkit.convert(mixed, tmp_path / "out", layout)
    assert list(tmp_path.iterdir()) == []


def test_experts_keep_their_names_and_refuse_a_layout_nobody_runs(tmp_path: Path) -> None:
    inner = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "moe_intermediate_size": 128}
    model = save_random(tmp_path / "float", "qwen3_moe", **inner, num_hidden_layers=1)
    changes = {"calibration.samples": 1, "calibration.length": 16, "scheme.group_size": "channel"}
    qtoolkit.quantize(model, "rtn", tmp_path / "int4", changes=changes)
    qtoolkit.convert(tmp_path / "int4", tmp_path / "gptq", "gptq")
    qtoolkit.convert(tmp_path / "gptq", tmp_path / "back", "int4")
    assert config(tmp_path / "back") == config(tmp_path / "int4")
    router = "model.layers.0.mlp.gate"
    assert any(
        router.replace(".", "\\.") in rule for rule in config(tmp_path / "gptq")["quantization_config"]["dynamic"]
    )
    with pytest.raises(RequestError, match="mixture of experts"):
        qtoolkit.convert(tmp_path / "int4", tmp_path / "qqq", "qqq")


def test_a_layer_that_a_layout_cannot_hold_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    model = save_random(tmp_path / "float")  # 128 inputs: one group of 128, which QQQ files do not have
    changes = {"calibration.samples": 1, "calibration.length": 16}
    qtoolkit.quantize(model, "rtn", tmp_path / "int4", changes=changes)
    with pytest.raises(RequestError, match=r"model\.layers\.0\..*128 inputs do not make two"):
        qtoolkit.convert(tmp_path / "int4", tmp_path / "out", "qqq")
    assert {path.name for path in tmp_path.iterdir()} == {"float", "int4"}


def test_an_output_that_is_there_is_kept_unless_asked(tiny: Path, tmp_path: Path) -> None:
    qtoolkit.convert(tiny, tmp_path / "out", "gptq")
    with pytest.raises(RequestError, match="finished checkpoint"):
        qtoolkit.convert(tiny, tmp_path / "out", "qqq")
    qtoolkit.convert(tiny, tmp_path / "out", "qqq", fresh=True)
    assert checkpoint.verify(tmp_path / "out").packing == ("qqq",)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
