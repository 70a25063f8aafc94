"""A recipe that packs in another tool's layout writes what conversion to it would: readable by its config alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qtoolkit
from qtoolkit import recipe
from qtoolkit.bridges import written
from qtoolkit.errors import RequestError
from qtoolkit.scheme import INT8, Scheme

QUICK = {"calibration.samples": 1, "calibration.length": 32}


@pytest.mark.parametrize("layout", ["gptq", "qqq", "int8"])
def test_quantized_into_a_layout_and_converted_to_it_are_the_same(layout: str, tiny: Path, tmp_path: Path) -> None:
    made, converted = tmp_path / "made", tmp_path / "converted"
    qtoolkit.quantize("tiny", recipe.load("rtn", QUICK).model_copy(update={"packer": layout}), made)
    qtoolkit.convert(tiny, converted, layout)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (made, converted)]
    assert configs[0] == configs[1]
    one, other = (load_file(folder / "model.safetensors") for folder in (made, converted))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_budget_is_refused_before_any_work_where_files_know_one_scheme(random_llama: Path, tmp_path: Path) -> None:
    wanted = recipe.load("rtn", {**QUICK, "budget.bits": 5.0}).model_copy(update={"packer": "gptq"})
    with pytest.raises(RequestError, match="cannot say that some layers have int8"):
        qtoolkit.quantize(random_llama, wanted, tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["gptq", "qqq"])
def test_other_schemes_are_never_left_out_of_a_config(layout: str) -> None:
    with pytest.raises(RequestError, match=layout):
        written.quantization_config(layout, Scheme(), [], {"model.layers.0.mlp.up_proj": INT8})
