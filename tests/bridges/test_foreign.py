"""Checkpoints that other tools wrote: read right, or refused in one sentence with nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import IntQuantizationCompressor, PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from foreign_support import GPTQ, Drawn, change_config, change_tensors, gptq, qqq, write
from safetensors.torch import load_file
from torch import Tensor

import qtoolkit
from qtoolkit import checkpoint
from qtoolkit.bridges import compressed as bridge
from qtoolkit.errors import QToolkitError
from qtoolkit.scheme import Scheme

QQQ = {"quant_method": "qqq", "wbits": 4, "group_size": 128}
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def config_of(layout: str, bits: int = 4, activations: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    """Return a compressed-tensors config as llm-compressor writes it."""
    own = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128} | weights
    group = {"targets": ["Linear"], "weights": own, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def compressed(layer: Drawn, config: dict[str, Any], compressor: Any) -> dict[str, Tensor]:
    """Return a layer as the compressed-tensors library itself stores it."""
    group = config["config_groups"]["group_0"]
    scheme = QuantizationScheme(targets=["Linear"], weights=group["weights"])
    return compressor.compress({"weight": layer.weight, "weight_scale": layer.scales.float()}, scheme)


def weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of every quantized layer, as our runtime would multiply them in float."""
    manifest = checkpoint.verify(folder)
    model: Any = qtoolkit.load(folder, activations=False, dtype=torch.float32)
    return {layer.name: model.get_submodule(layer.name).weight for layer in manifest.layers}


BYTES = IntQuantizationCompressor
W4A16, W4A8 = config_of("pack-quantized"), config_of("int-quantized", activations=TOKEN)
DIALECTS: dict[str, tuple[dict[str, Any], Callable[[Drawn], dict[str, Tensor]], int]] = {
    "gptq": (GPTQ, gptq, 128),
    "gptq channel": ({**GPTQ, "group_size": -1, "desc_act": True, "checkpoint_format": "gptq"}, gptq, -1),
    "gptq_v2": ({**GPTQ, "checkpoint_format": "gptq_v2"}, partial(gptq, minus=0), 128),
    "qqq": (QQQ, qqq, 128),
    "qqq channel": ({"quant_method": "qqq", "bits": 4, "q_group_size": -1}, qqq, -1),
    "packed": (W4A16, partial(compressed, config=W4A16, compressor=PackedQuantizationCompressor), 128),
    "bytes": (W4A8, partial(compressed, config=W4A8, compressor=BYTES), 128),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_codes_and_scales_are_those_that_were_written(dialect: str, base: Path, tmp_path: Path) -> None:
    config, layer, group = DIALECTS[dialect]
    drawn = write(base, tmp_path / "foreign", config, layer, group)
    found = qtoolkit.convert(tmp_path / "foreign", tmp_path / "out", "int4")
    assert found.layers == len(drawn) == 7
    assert found.scale_error == 0
    assert Scheme(group_size=group).name == found.scheme
    read = weights(tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in drawn.items():
        if dialect == "qqq":  # whose files hold the scale in two factors, one of them rounded to float16
            assert ((read[name] - weight.weight).abs() <= 2**-11 * weight.weight.abs()).all(), name
            assert stored[f"{name}.weight_scale"].dtype == torch.float32
        else:
            assert torch.equal(read[name], weight.weight), name
    floats = load_file(tmp_path / "foreign" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", "lm_head.weight"):
        assert torch.equal(stored[name], floats[name])
    note = any("nothing was calibrated" in text for text in found.notes)
    assert note == (dialect.startswith("gptq") or dialect == "packed")


def test_a_foreign_checkpoint_becomes_one_of_ours(base: Path, tmp_path: Path) -> None:
    write(base, tmp_path / "foreign", GPTQ, gptq)
    (tmp_path / "foreign" / "quantize_config.json").write_text("{}")
    qtoolkit.convert(tmp_path / "foreign", tmp_path / "out", "int4")
    manifest = checkpoint.verify(tmp_path / "out")
    assert (manifest.recipe, manifest.errors, manifest.converted[0].layout) == ({}, {}, "gptq")
    assert manifest.bytes_before > manifest.bytes_after
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == bridge.config(Scheme(), ["lm_head"])
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_scales_that_gptq_files_cannot_hold_are_rounded_and_it_is_said(base: Path, tmp_path: Path) -> None:
    write(base, tmp_path / "foreign", QQQ, qqq)
    found = qtoolkit.convert(tmp_path / "foreign", tmp_path / "out", "gptq")
    assert 0 < found.scale_error <= 2**-11  # float16 has 11 bits
    assert checkpoint.verify(tmp_path / "out").converted[0].scale_error == found.scale_error
    assert f"rounded, by at most {found.scale_error:.2g}" in found.notes[0]


def test_an_original_qqq_file_comes_back_from_int4_as_it_means(base: Path, tmp_path: Path) -> None:
    """Its two scales may be split otherwise: what they multiply to is the same."""
    write(base, tmp_path / "foreign", QQQ, qqq)
    qtoolkit.convert(tmp_path / "foreign", tmp_path / "int4", "int4")
    found = qtoolkit.convert(tmp_path / "int4", tmp_path / "qqq", "qqq")
    assert found.scale_error <= 2**-11
    old, new = (load_file(tmp_path / folder / "model.safetensors") for folder in ("foreign", "qqq"))
    assert all(torch.equal(old[name], new[name]) for name in old if name.endswith(".B"))


def test_eight_bits_stay_eight_bits(base: Path, tmp_path: Path) -> None:
    """What llm-compressor calls W8A8: nothing changes but that qtoolkit knows it; four bits cannot hold it."""
    config = config_of("int-quantized", 8, TOKEN, strategy="channel", group_size=None)
    drawn = write(base, tmp_path / "w8a8", config, partial(compressed, config=W4A8, compressor=BYTES), -1)
    found = qtoolkit.convert(tmp_path / "w8a8", tmp_path / "out", "int8")
    assert found.scheme == "W8A8-channel"
    read = weights(tmp_path / "out")
    assert all(torch.equal(read[name], weight.weight) for name, weight in drawn.items())
    for layout in ("int4", "gptq", "qqq"):
        with pytest.raises(QToolkitError, match="8-bit weights only"):
            qtoolkit.convert(tmp_path / "w8a8", tmp_path / layout, layout)


def test_wide_scales_are_told_for_as_long_as_they_are_there(base: Path, tmp_path: Path) -> None:
    write(base, tmp_path / "foreign", QQQ, qqq)
    notes = [
        qtoolkit.convert(tmp_path / source, tmp_path / layout, layout).notes
        for source, layout in (("foreign", "int4"), ("int4", "gptq"), ("gptq", "int8"))
    ]
    assert [any("stay in float32" in note for note in found) for found in notes] == [True, False, False]


def test_an_architecture_that_nobody_described_is_converted_all_the_same(base: Path, tmp_path: Path) -> None:
    write(base, tmp_path / "foreign", GPTQ, gptq)
    change_config(tmp_path / "foreign", model_type="brand_new")
    qtoolkit.convert(tmp_path / "foreign", tmp_path / "out", "int4")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert set(config["quantization_config"]["ignore"]) == {"lm_head", "model.embed_tokens"}


def test_settings_in_a_side_file_are_found(base: Path, tmp_path: Path) -> None:
    write(base, tmp_path / "foreign", QQQ, qqq)
    change_config(tmp_path / "foreign", quantization_config=None)
    (tmp_path / "foreign" / "quant_config.json").write_text(json.dumps({"wbits": 4, "group_size": 128}))
    assert qtoolkit.convert(tmp_path / "foreign", tmp_path / "out", "int4").layers == 7


Change = Callable[[Path], None]


def drop(name: str) -> Change:
    return lambda folder: change_tensors(folder, lambda stored: stored.__delitem__(name))


def put(name: str, tensor: Tensor) -> Change:
    return lambda folder: change_tensors(folder, lambda stored: stored.update({name: tensor}))


def said(config: dict[str, Any]) -> Change:
    return lambda folder: change_config(folder, quantization_config=config)


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


Q = "model.layers.0.self_attn.q_proj"
ZEROS = torch.full((2, 32), 0x77777776, dtype=torch.int32)
SCATTERED = torch.arange(256, dtype=torch.int32) % 2
WRONG: dict[str, tuple[str, Change, int, str]] = {
    "zero points said": ("gptq", said({**GPTQ, "sym": False}), 2, "zero points"),
    "zero points stored": ("gptq", put(f"{Q}.qzeros", ZEROS), 2, f"{Q}: .*zero points"),
    "desc_act": ("gptq", put(f"{Q}.g_idx", SCATTERED), 2, "desc_act"),
    "eight bits": ("gptq", said({**GPTQ, "bits": 8}), 2, "8 bits"),
    "marlin": ("gptq", said({**GPTQ, "checkpoint_format": "marlin"}), 2, "'marlin'"),
    "one layer of eight bits": ("gptq", said({**GPTQ, "dynamic": {".*down": {"bits": 8}}}), 2, "changes bits"),
    "another group": (
        "gptq",
        said({**GPTQ, "group_size": 64}),
        1,
        "512 inputs, which is not W4A8-g64",
    ),
    "groups of seven": ("gptq", said({**GPTQ, "group_size": 7}), 2, "group size is 7"),
    "awq": ("gptq", said({"quant_method": "awq", "bits": 4}), 2, "'awq'"),
    "nothing said": ("gptq", said({}), 2, "is not quantized"),
    "not quantized": ("gptq", lambda folder: change_config(folder, quantization_config=None), 2, "is not quantized"),
    "odd config": ("gptq", said({**GPTQ, "dynamic": [1]}), 1, "odd quantization_config"),
    "missing tensor": ("gptq", drop(f"{Q}.scales"), 1, "has no tensor scales"),
    "no codes": ("gptq", said(QQQ), 1, r"\*\.B"),
    "cut": ("gptq", cut, 1, "damaged or truncated"),
    "qqq desc_act": ("qqq", said({**QQQ, "desc_act": True}), 2, "desc_act"),
    "qqq groups of 64": ("qqq", said({**QQQ, "group_size": 64}), 2, "group size is 64"),
    "qqq half": ("qqq", put(f"{Q}.B", torch.zeros(8, 512, dtype=torch.int32)), 1, "do not belong together"),
    "asymmetric": ("packed", said(config_of("pack-quantized", symmetric=False)), 2, "not symmetric"),
    "packed eight bits": ("packed", said(config_of("pack-quantized", 8)), 2, "8-bit"),
    "float": ("packed", said(config_of("float-quantized", 8, type="float")), 2, "float-quantized"),
    "a scale a tensor": ("packed", said(config_of("pack-quantized", strategy="tensor")), 2, "for each tensor"),
    "float inputs": ("packed", said(config_of("pack-quantized", activations={**TOKEN, "type": "float"})), 2, "float"),
    "act order": ("packed", put(f"{Q}.weight_g_idx", SCATTERED), 2, "order of their activations"),
    "kv cache": ("packed", said({**W4A16, "kv_cache_scheme": {"num_bits": 8}}), 2, "kv_cache_scheme"),
    "no group": ("packed", said({**W4A16, "config_groups": {}}), 1, "No group"),
    "large codes": ("bytes", put(f"{Q}.weight", torch.full((256, 256), 9, dtype=torch.int8)), 1, "codes 9..9"),
    "not a number": ("packed", put(f"{Q}.weight_scale", torch.full((256, 2), torch.nan)), 1, "NaN"),
}


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one checkpoint of each tool."""
    folder = tmp_path_factory.mktemp("written")
    for name in {dialect for dialect, *_ in WRONG.values()}:
        write(base, folder / name, *DIALECTS[name])
    return folder


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_read_is_refused_in_one_sentence(case: str, written: Path, tmp_path: Path) -> None:
    dialect, change, code, words = WRONG[case]
    shutil.copytree(written / dialect, tmp_path / "foreign")
    change(tmp_path / "foreign")
    with pytest.raises(QToolkitError, match=words) as refused:
        qtoolkit.convert(tmp_path / "foreign", tmp_path / "out", "int4")
    assert refused.value.exit_code == code
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["foreign"]
