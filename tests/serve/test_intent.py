"""Which checkpoints ask for W4A8."""

from __future__ import annotations

from typing import Any

import pytest

from qtoolkit.bridges import compressed
from qtoolkit.errors import RequestError
from qtoolkit.scheme import Head, Scheme
from qtoolkit.serve.intent import Attention, Declared, Mode, attention, declared, head, mode

INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}


def config(*groups: tuple[dict[str, Any], dict[str, Any] | None]) -> dict[str, Any]:
    rows = {f"group_{i}": {"weights": w, "input_activations": a} for i, (w, a) in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "config_groups": rows}


def test_our_own_checkpoints_declare_it() -> None:
    assert declared(compressed.config(Scheme(), ["lm_head"])) is Declared.ALL


@pytest.mark.parametrize(
    "wrong",
    [{"num_bits": 16}, {"type": "float"}, {"symmetric": False}, {"dynamic": False}, {"strategy": "tensor"}],
    ids=lambda change: next(iter(change)),
)
def test_other_activations_do_not(wrong: dict[str, Any]) -> None:
    assert declared(config((INT4, {**INT8, **wrong}))) is Declared.NONE


def test_weights_alone_do_not() -> None:
    assert declared(config((INT4, None))) is Declared.NONE


def test_some_groups_declaring_it_means_some() -> None:
    assert declared(config((INT4, INT8), (INT4, None))) is Declared.SOME


def test_groups_of_other_widths_do_not_count() -> None:
    assert declared(config((INT4, INT8), ({**INT4, "num_bits": 8}, None))) is Declared.ALL


def test_a_mixture_s_experts_do_not_count() -> None:
    ours = compressed.config(Scheme(), ["lm_head"], experts=".mlp.experts.")
    assert [group["input_activations"] is None for group in ours["config_groups"].values()] == [False, True]
    assert declared(ours) is Declared.ALL


@pytest.mark.parametrize("other", [None, {}, {"quant_method": "gptq", "bits": 4, "group_size": 128}])
def test_a_config_without_groups_declares_nothing(other: dict[str, Any] | None) -> None:
    assert declared(other) is Declared.NONE


@pytest.mark.parametrize(("value", "expected"), [("", Mode.DECLARED), ("Always", Mode.ALWAYS), ("off", Mode.OFF)])
def test_the_environment_chooses_the_mode(monkeypatch: pytest.MonkeyPatch, value: str, expected: Mode) -> None:
    monkeypatch.setenv("QTOOLKIT_W4A8", value)
    assert mode() is expected


def test_an_unknown_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTOOLKIT_W4A8", "yes")
    with pytest.raises(RequestError, match="QTOOLKIT_W4A8=yes"):
        mode()


def test_the_output_layer_stays_in_float_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QTOOLKIT_LM_HEAD", raising=False)
    assert head() is Head.FLOAT
    monkeypatch.setenv("QTOOLKIT_LM_HEAD", "INT8")
    assert head() is Head.INT8
    monkeypatch.setenv("QTOOLKIT_LM_HEAD", "vllm")
    assert head() is None


def test_an_unknown_output_layer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTOOLKIT_LM_HEAD", "int3")
    with pytest.raises(RequestError, match="QTOOLKIT_LM_HEAD=int3") as caught:
        head()
    assert "float, int8, int4, vllm" in str(caught.value.hint)


def test_our_attention_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QTOOLKIT_ATTENTION", raising=False)
    assert attention() is Attention.OWN
    monkeypatch.setenv("QTOOLKIT_ATTENTION", "vLLM")
    assert attention() is Attention.VLLM
