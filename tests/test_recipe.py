"""Recipes: what is refused, what changes the digest, and that the shipped ones load."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtoolkit import recipe
from qtoolkit.errors import RequestError
from qtoolkit.pipeline import build_transforms
from qtoolkit.registry import transforms


@pytest.mark.parametrize("name", sorted(name for name in recipe.presets()))
def test_every_preset_loads_and_says_what_it_is(name: str) -> None:
    loaded = recipe.load(name)
    assert loaded.name == name
    assert loaded.about


def test_a_recipe_survives_yaml(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(recipe.load("w4a8", {"gptq.damping": 0.5}).to_yaml())
    assert recipe.load(file) == recipe.load("w4a8", {"gptq.damping": 0.5})


def test_the_digest_changes_with_what_changes_the_result_and_not_with_the_name() -> None:
    plain = recipe.load("w4a8")
    assert recipe.load("w4a8", {"gptq.damping": 0.5}).digest != plain.digest
    assert plain.model_copy(update={"name": "other", "about": "x"}).digest == plain.digest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scheme.group_sise": 64}, ["scheme.group_sise", "group_size"]),
        ({"scheme.group_size": 12}, ["scheme.group_size", "12"]),
        ({"calibration.samples": 0}, ["calibration.samples", "0"]),
        ({"gtpq.damping": 1}, ["gtpq", "gptq"]),
    ],
)
def test_wrong_keys_and_values_are_named_with_a_hint(changes: dict[str, object], words: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        recipe.load("w4a8", changes)
    for word in words:
        assert word in str(caught.value)


def test_an_unknown_preset_file_and_step_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="w4a8"):
        recipe.load("w4a9")
    with pytest.raises(RequestError, match="no recipe file"):
        recipe.load(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("steps: [")
    with pytest.raises(RequestError, match="not valid YAML"):
        recipe.load(broken)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(RequestError, match="cannot be read"):
        recipe.load(binary)
    with pytest.raises(RequestError, match="smooth"):
        build_transforms(recipe.validate({"name": "x", "steps": {"smoth": {}}}))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nme: x\nsteps: {gptq: {}}", ["Unknown", "'nme'", "name"]),
        ("name: x", ["no 'steps'"]),
        ("name: x\nscheme: 3\nsteps: {gptq: {}}", ["scheme", "3"]),
        ("name: x\nsteps: {gptq: 3}", ["steps.gptq", "3"]),
        ("name: x\nkind: sound\nsteps: {gptq: {}}", ["sound", "llm and vision"]),
    ],
)
def test_a_file_of_the_wrong_form_is_refused_by_place(text: str, words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(RequestError) as caught:
        recipe.load(file, {"scheme.group_size": 64, **({"gptq.damping": 1} if "gptq" in text else {})})
    for word in words:
        assert word in str(caught.value)


def test_set_words_are_read_as_yaml_scalars() -> None:
    assert recipe.parse_set(["gptq.damping=0.02", "gptq.compensate=false"]) == {
        "gptq.damping": 0.02,
        "gptq.compensate": False,
    }
    with pytest.raises(RequestError, match=r"step\.key=value"):
        recipe.parse_set(["damping"])
    with pytest.raises(RequestError, match="no value"):
        recipe.parse_set(["gptq.damping=["])


def test_every_registered_transform_imports_and_has_options() -> None:
    for name in transforms.names():
        assert transforms.get(name).Options.model_config["extra"] == "forbid"
