"""The output layer in vLLM: rounded once, the embedding left alone, float where it must stay so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.custom_op import op_registry_oot

from qtoolkit import head
from qtoolkit.kernels.cpu import bfloat16
from qtoolkit.scheme import Head
from qtoolkit.serve import vllm_head, vllm_report


def config(dtype: torch.dtype = torch.float32, quantization: str | None = "qqq", **changes: Any) -> SimpleNamespace:
    """Return as much of a vLLM config as the layer looks at."""
    model = SimpleNamespace(dtype=dtype, head_dtype=changes.pop("head_dtype", dtype), quantization=quantization)
    return SimpleNamespace(**{"lora_config": None, "model_config": model, **changes})


class Stock:
    """Stands for vLLM's own method: multiplies in float, and notes that it packed the matrix."""

    packed = False

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.packed = True

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, layer.weight, bias)


def method(monkeypatch: pytest.MonkeyPatch, kind: Head, **changes: Any) -> tuple[vllm_head.HeadMethod, Any]:
    """Return a method and a layer of 64 tokens and 128 inputs with loaded weights."""
    monkeypatch.setattr(vllm_head, "get_current_vllm_config", lambda: config(**changes))
    made = vllm_head.HeadMethod(kind)
    made.stock = Stock()  # type: ignore[assignment]
    layer: Any = torch.nn.Module()
    torch.manual_seed(0)
    layer.weight = torch.nn.Parameter(torch.randn(64, 128), requires_grad=False)
    return made, layer


needs_product = pytest.mark.skipif(
    bfloat16.refuse(torch.bfloat16, "cpu") is not None, reason="our bfloat16 product does not run here"
)


@needs_product
def test_a_bfloat16_matrix_runs_on_our_product_in_a_copy_that_replaces_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made, layer = method(monkeypatch, Head.FLOAT, dtype=torch.bfloat16)
    weight = layer.weight.data.bfloat16()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    x, bias = torch.randn(3, 128).bfloat16(), torch.randn(64).bfloat16()
    made.process_weights_after_loading(layer)
    assert torch.equal(made.apply(layer, x, bias), bfloat16.linear(x, bfloat16.prepare(weight), bias, 64))
    assert layer.weight.numel() == 0
    reported = vllm_report.describe_layer("lm_head", with_method(layer, made), None)  # type: ignore[arg-type]
    assert (reported.kernel, reported.reason) == ("bf16-cpu", "it is not quantized in the checkpoint")


@needs_product
def test_a_bfloat16_matrix_is_compressed_where_its_values_allow_that(monkeypatch: pytest.MonkeyPatch) -> None:
    for weight, allowed in (
        (torch.randn(64, 128).bfloat16(), True),
        (torch.randint(-(2**15), 2**15, (64, 128), dtype=torch.int16).view(torch.bfloat16), False),
    ):
        made, layer = method(monkeypatch, Head.FLOAT, dtype=torch.bfloat16)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        made.process_weights_after_loading(layer)
        assert isinstance(made.made, head.FloatHead)
        assert isinstance(made.made.weight, torch.Tensor) is not allowed


@needs_product
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"quantization": None}, "are vLLM's"),
        ({"dtype": torch.float16}, "torch.float16"),
        ({"head_dtype": torch.float32}, "logits in torch.float32"),
        ({"lora_config": object()}, "adapters"),
    ],
)
def test_a_float_matrix_is_left_to_vllm_where_ours_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str | None
) -> None:
    monkeypatch.setattr(vllm_head, "get_current_vllm_config", lambda: config(**{"dtype": torch.bfloat16, **changes}))
    reason = vllm_head._refuse_float()
    assert reason is None if words is None else words in str(reason)


@needs_product
@pytest.mark.parametrize(("word", "ours"), [("float", True), ("vllm", False), ("int8", True)])
def test_the_variable_says_whose_output_layer_it_is(monkeypatch: pytest.MonkeyPatch, word: str, ours: bool) -> None:
    def build(self: Any) -> None:
        torch.nn.Module.__init__(self)
        self.quant_method = vllm_head.UnquantizedEmbeddingMethod()

    monkeypatch.setenv("QTOOLKIT_LM_HEAD", word)
    monkeypatch.setattr(vllm_head, "get_current_vllm_config", lambda: config(dtype=torch.bfloat16))
    monkeypatch.setattr(vllm_head.ParallelLMHead, "__init__", build)
    assert isinstance(vllm_head.OutputLayer().quant_method, vllm_head.HeadMethod) is ours


@pytest.mark.parametrize("kind", [Head.INT8, Head.INT4])
def test_logits_are_those_of_the_rounded_matrix(monkeypatch: pytest.MonkeyPatch, kind: Head) -> None:
    made, layer = method(monkeypatch, kind)
    x, bias, weight = torch.randn(3, 128), torch.randn(64), layer.weight.data
    made.process_weights_after_loading(layer)
    assert torch.equal(made.apply(layer, x, bias), head.quantize(weight, kind, torch.float32)(x, bias))
    assert vllm_report.describe_layer("lm_head", with_method(layer, made), None).kernel.endswith("-cpu")  # type: ignore[arg-type]


def with_method(layer: Any, made: vllm_head.HeadMethod) -> Any:
    layer.quant_method = made
    return layer


def test_the_float_matrix_is_dropped_but_a_tied_embedding_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made, layer = method(monkeypatch, Head.INT8)
    embedding: Any = torch.nn.Module()
    embedding.weight = layer.weight
    made.tie_weights(layer, embedding)
    before = embedding.weight.clone()
    made.process_weights_after_loading(layer)
    assert layer.weight.numel() == 0
    assert torch.equal(embedding.weight, before)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"lora_config": object()}, "adapters"), ({"head_dtype": torch.float64}, "logits in torch.float64")],
)
def test_it_stays_in_float_where_the_float_matrix_is_needed(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    made, layer = method(monkeypatch, Head.INT8, **changes)
    made.process_weights_after_loading(layer)
    x = torch.randn(3, 128)
    assert torch.equal(made.apply(layer, x), x @ layer.weight.t())
    reported = vllm_report.describe_layer("lm_head", with_method(layer, made), None)  # type: ignore[arg-type]
    assert reported.kernel == "unquantized"
    assert words in reported.reason


def test_an_embedding_is_packed_when_it_first_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[Any] = []
    base = vllm_head.UnquantizedEmbeddingMethod
    monkeypatch.setattr(base, "process_weights_after_loading", lambda self, layer: packed.append(layer))
    monkeypatch.setattr(base, "apply", lambda self, layer, x, bias=None: x)
    lookup, layer = vllm_head.LookupMethod(), torch.nn.Module()
    lookup.process_weights_after_loading(layer)
    assert not packed
    lookup.apply(layer, torch.ones(1))
    lookup.apply(layer, torch.ones(1))
    assert packed == [layer]


def test_registering_twice_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(op_registry_oot, "ParallelLMHead", raising=False)
    monkeypatch.delitem(op_registry_oot, "VocabParallelEmbedding", raising=False)
    vllm_head.register_head()
    vllm_head.register_head()
    assert op_registry_oot["ParallelLMHead"] is vllm_head.OutputLayer
    assert op_registry_oot["VocabParallelEmbedding"] is vllm_head.Embedding
