"""Which compiled graphs are recorded, and that repeated steps compute what the graph does."""

from __future__ import annotations

import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")

from torch._inductor.codecache import CppPythonBindingsCodeCache
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

from qtoolkit.errors import RequestError
from qtoolkit.kernels.cpu import backend
from qtoolkit.kernels.cpu.attention import library
from qtoolkit.kernels.selection import Problem
from qtoolkit.serve import vllm_attention, vllm_repeat
from qtoolkit.serve.intent import Steps, steps
from qtoolkit.serve.vllm_repeat import Graph, Graphs, strange_names

pytestmark = pytest.mark.skipif(
    library.failure() is not None or torch.cpu._is_amx_tile_supported() != library.tiles(),
    reason="vLLM's attention stays on this CPU",
)
HEADS, KEY_HEADS, DIM, PAGE = 8, 2, 32, 32  # four heads share keys
K, QKV = HEADS * DIM, (HEADS + 2 * KEY_HEADS) * DIM
PLAIN = "torch.ops.qtoolkit.w4a8_linear_cpu.default(x, weight, scales, None, 384, 128)"
# As torch generates them: one argument, names of its own module, memory that is given up and taken again.
CODE = f"""
def call(self, args):
    tokens, x, weight, scales, layer = args
    args.clear()
    doubled = empty_strided_cpu((tokens, 256), (256, 1), torch.bfloat16)
    cpp_double(x, doubled, tokens)
    x = doubled; del doubled
    qkv = {PLAIN}
    out = empty_strided_cpu((tokens, 256), (256, 1), torch.bfloat16)
    torch.ops.vllm.unified_attention_with_output.default(
        reinterpret_tensor(qkv, (tokens, 8, 32), (384, 32, 1), 0),
        reinterpret_tensor(qkv, (tokens, 2, 32), (384, 32, 1), 256),
        reinterpret_tensor(qkv, (tokens, 2, 32), (384, 32, 1), 320),
        reinterpret_tensor(out, (tokens, 8, 32), (256, 32, 1), 0), layer)
    return (out,)
"""
DOUBLE = """
#include <cstdint>
extern "C" void kernel(const uint16_t* from, uint16_t* to, const int64_t tokens) {
    for (int64_t i = 0; i < tokens * 256; ++i) to[i] = from[i] & 0x7fff ? uint16_t(from[i] + 0x80) : from[i];
}
"""


def generated(code: str) -> types.FunctionType:
    """Return ``call`` as a module that torch generated has it."""
    kernel = CppPythonBindingsCodeCache.load_pybinding(["const uint16_t*", "uint16_t*", "int64_t"], DOUBLE)
    names: dict[str, Any] = {
        "torch": torch,
        "cpp_double": kernel,
        "empty_strided_cpu": torch._C._dynamo.guards._empty_strided_cpu,
        "reinterpret_tensor": torch._C._dynamo.guards._reinterpret_tensor,
        "extern_kernels": object(),
    }
    exec(code, names)
    made = names["call"]
    assert isinstance(made, types.FunctionType)
    return made


class Engine:
    """A layer with its cache, weights, and batches of single tokens in a forward context."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, sequences: int) -> None:
        config = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.bfloat16))
        monkeypatch.setattr(vllm_attention, "get_current_vllm_config", lambda: config)
        monkeypatch.setattr("vllm.v1.attention.backends.cpu_attn.get_current_vllm_config", lambda: config)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        self.generator = torch.Generator().manual_seed(0)
        words = torch.randint(-(2**31), 2**31 - 1, (QKV, K // 8), dtype=torch.int32, generator=self.generator)
        scales = torch.rand(QKV, K // 128, generator=self.generator) / 100
        self.weights = backend.prepare(words, scales, Problem(K, QKV, 128, torch.bfloat16, "cpu"))
        implementation = vllm_attention.OwnAttention(HEADS, DIM, DIM**-0.5, KEY_HEADS, None, None, "auto")
        cache = torch.randn(4 * sequences, KEY_HEADS, PAGE, 2 * DIM, generator=self.generator).bfloat16()
        self.layer = SimpleNamespace(impl=implementation, isa="vec", kv_cache=cache)
        self.table = torch.arange(4 * sequences, dtype=torch.int32).view(sequences, 4)
        self.x = torch.zeros(sequences, K).bfloat16()
        self.context = SimpleNamespace(attn_metadata=None, no_compile_layers={"layer": self.layer}, slot_mapping={})
        for module in ("vllm.model_executor.layers.attention.attention", "qtoolkit.serve.vllm_repeat"):
            monkeypatch.setattr(f"{module}.get_forward_context", lambda: self.context)
        monkeypatch.setattr(vllm_repeat, "is_forward_context_available", lambda: True)

    def step(self, length: int) -> None:
        """Have a new token at place ``length - 1`` of every sequence."""
        n = len(self.x)
        self.x.copy_(torch.randn(n, K, generator=self.generator))
        slots = self.table[:, (length - 1) // PAGE].long() * PAGE + (length - 1) % PAGE
        starts, lengths = torch.arange(n + 1).int(), torch.full((n,), length).int()
        batch = CPUAttentionMetadata(n, 1, starts, length, lengths, self.table, slots, None, True)
        self.context.attn_metadata = {"layer": batch, "another": batch}

    def inputs(self) -> list[Any]:
        return [len(self.x), self.x, *self.weights, "layer"]


def never(inputs: list[Any]) -> Any:
    raise AssertionError("the graph ran as ever")


@pytest.mark.parametrize("sequences", [1, 3])
def test_repeated_steps_give_the_graphs_bits_and_cache(monkeypatch: pytest.MonkeyPatch, sequences: int) -> None:
    engine, function, graphs = Engine(monkeypatch, sequences), generated(CODE), Graphs()
    for length in (5, 6, 33, 100):
        engine.step(length)
        before = engine.layer.kv_cache.clone()
        inputs = engine.inputs()
        (answer,) = graphs.run(function, inputs, never)
        assert inputs == []  # as torch's code leaves them
        written = engine.layer.kv_cache.clone()
        engine.layer.kv_cache.copy_(before)
        (expected,) = function(None, engine.inputs())
        assert torch.equal(answer, expected)
        assert torch.equal(written, engine.layer.kv_cache)
        assert not torch.equal(written, before)
    (graph,) = graphs.graphs.values()
    assert graph.recordings == {(sequences,): 1}


def test_what_an_earlier_step_returned_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, function, graphs = Engine(monkeypatch, 2), generated(CODE), Graphs()
    answers, copies = [], []
    for length in (5, 6, 7):
        engine.step(length)
        answers.append(graphs.run(function, engine.inputs(), never)[0])
        copies.append(answers[-1].clone())
    assert all(torch.equal(a, b) for a, b in zip(answers, copies, strict=True))


def test_inputs_at_another_place_are_recorded_anew_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, function, graphs = Engine(monkeypatch, 2), generated(CODE), Graphs()
    kept = []
    for length in range(5, 5 + vllm_repeat.MOST_RECORDINGS):
        kept.append(engine.x)
        engine.x = torch.zeros_like(engine.x)
        engine.step(length)
        (answer,) = graphs.run(function, engine.inputs(), never)
        assert torch.equal(answer, function(None, engine.inputs())[0])
    kept.append(engine.x)
    engine.x = torch.zeros_like(engine.x)
    engine.step(20)
    with pytest.raises(AssertionError, match="as ever"):
        graphs.run(function, engine.inputs(), never)


def test_a_cache_at_another_place_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, function, graphs = Engine(monkeypatch, 2), generated(CODE), Graphs()
    for length in (5, 6):
        engine.step(length)
        engine.layer.kv_cache = engine.layer.kv_cache.clone()
        (answer,) = graphs.run(function, engine.inputs(), never)
        assert torch.equal(answer, function(None, engine.inputs())[0])


def test_a_prompt_runs_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, function, graphs = Engine(monkeypatch, 2), generated(CODE), Graphs()
    engine.step(5)
    engine.context.attn_metadata["layer"].max_query_len = 2
    with pytest.raises(AssertionError, match="as ever"):
        graphs.run(function, engine.inputs(), never)
    engine.context.attn_metadata = None  # a run that only warms up
    with pytest.raises(AssertionError, match="as ever"):
        graphs.run(function, engine.inputs(), never)


@pytest.mark.parametrize(
    ("changed", "strange"),
    [
        (CODE, set()),
        (CODE.replace("return (out,)", "return (out.item(),)"), {"item"}),
        (
            CODE.replace("return (out,)", "extern_kernels.mm(x, x, out=out)\n    return (out,)"),
            {"extern_kernels", "mm"},
        ),
        (CODE.replace("return (out,)", "torch.ops.aten.relu.default(out)\n    return (out,)"), {"aten", "relu"}),
        (CODE.replace("return (out,)", "return (unheard_of(out),)"), {"unheard_of"}),
        (CODE.replace(PLAIN, "x"), {backend.OPERATOR}),
    ],
)
def test_a_graph_that_names_anything_else_is_not_recorded(changed: str, strange: set[str]) -> None:
    function = generated(changed)
    assert strange <= strange_names(function)
    assert bool(strange) == bool(Graph(function).strange)


def test_attention_that_is_not_ours_runs_and_ends_the_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, function, graphs = Engine(monkeypatch, 2), generated(CODE), Graphs()
    engine.layer.impl.reason = "for this test"
    seen: list[Any] = []
    own = SimpleNamespace(default=lambda *given: seen.append(given))
    monkeypatch.setattr(torch.ops.vllm, "unified_attention_with_output", own)
    engine.step(5)
    graphs.run(function, engine.inputs(), never)
    (given,) = seen
    assert given[0].shape == (2, HEADS, DIM)
    with pytest.raises(AssertionError, match="as ever"):
        graphs.run(function, engine.inputs(), never)


def test_the_short_way_holds_until_a_step_of_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, function, graphs = Engine(monkeypatch, 2), generated(CODE), Graphs()
    ways: list[str] = []

    def model(result: Callable[[Tensor], Tensor] = lambda x: x) -> Any:
        def long() -> Tensor:
            ways.append("long")
            return result(graphs.run(function, engine.inputs(), never)[0])

        return graphs.run_model(function, (None, engine.x), long)

    for length in (5, 6, 7, 8):
        engine.step(length)
        answer = model()
        assert torch.equal(answer, function(None, engine.inputs())[0])
    assert ways == ["long"] * 2  # recorded, repeated with everything looked at, and then short
    graphs.forget()
    model()
    assert ways == ["long"] * 3
    graphs.forget()
    model(lambda x: x * 2)  # a model that does something with what its graph returns
    model(lambda x: x * 2)
    assert ways == ["long"] * 5


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QTOOLKIT_STEPS", raising=False)
    assert steps() is Steps.REPEATED
    monkeypatch.setenv("QTOOLKIT_STEPS", "vLLM")
    assert steps() is Steps.VLLM
    monkeypatch.setenv("QTOOLKIT_STEPS", "twice")
    with pytest.raises(RequestError, match="QTOOLKIT_STEPS=twice"):
        steps()
