"""When the plugin's attention runs in vLLM, and that it computes what vLLM's own does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")

from vllm import _custom_ops as ops
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from qtoolkit import __version__
from qtoolkit.bridges import compressed
from qtoolkit.errors import RequestError
from qtoolkit.kernels.cpu.attention import library
from qtoolkit.scheme import Scheme
from qtoolkit.serve import vllm_attention, vllm_graphs, vllm_plugin
from qtoolkit.serve.report import attention as line
from qtoolkit.serve.vllm_attention import Backend, OwnAttention, StockAttention

ours = pytest.mark.skipif(
    library.failure() is not None or torch.cpu._is_amx_tile_supported() != library.tiles(),
    reason="vLLM's attention stays on this CPU",
)
DECLARED = compressed.config(Scheme(), ["lm_head"])
HEADS, KEY_HEADS, DIM, PAGE = 8, 2, 64, 32  # four heads share keys


def config(quantization: dict[str, Any] | None, method: str | None, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return as much of a vLLM config as attention looks at."""
    arch = SimpleNamespace(quantization_config=quantization)
    return SimpleNamespace(model_config=SimpleNamespace(model_arch_config=arch, quantization=method, dtype=dtype))


W4A8 = config(DECLARED, "compressed-tensors")


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand for the engine that builds a W4A8 model."""
    monkeypatch.delenv("QTOOLKIT_ATTENTION", raising=False)
    use(monkeypatch, W4A8)


def use(monkeypatch: pytest.MonkeyPatch, own: Any) -> None:
    monkeypatch.setattr(vllm_attention, "get_current_vllm_config_or_none", lambda: own)
    for module in (vllm_attention, cpu_attn):
        monkeypatch.setattr(module, "get_current_vllm_config", lambda: own)


def layer(kind: type[CPUAttentionBackendImpl] = OwnAttention, **changes: Any) -> Any:
    """Return one layer's implementation."""
    values: dict[str, Any] = {
        "num_heads": HEADS, "head_size": DIM, "scale": DIM**-0.5, "num_kv_heads": KEY_HEADS, "alibi_slopes": None,
        "sliding_window": None, "kv_cache_dtype": "auto",
    }  # fmt: skip
    return kind(**{**values, **changes})


@pytest.mark.parametrize(
    ("layout", "kinds", "wanted"),
    [
        ("amx", [OwnAttention, OwnAttention], "vec"),
        ("amx", [OwnAttention, StockAttention], "amx"),  # layers of a group share how their cache lies
        ("vec", [OwnAttention], "vec"),
        ("neon", [OwnAttention], "neon"),
    ],
)
@ours
def test_the_cache_lies_as_the_kernel_of_all_its_layers_reads_it(
    monkeypatch: pytest.MonkeyPatch, layout: str, kinds: list[type[CPUAttentionBackendImpl]], wanted: str
) -> None:
    layers = {f"layers.{i}": SimpleNamespace(impl=layer(kind)) for i, kind in enumerate(kinds)}

    def built(self: Any, spec: object, names: list[str], own: object, device: object) -> None:
        self.vllm_config, self.layer_names, self.isa = own, names, layout
        self._set_isa_to_layers(names)

    def found(own: object, kind: object, names: list[str]) -> dict[str, Any]:
        return {name: layers[name] for name in names}

    monkeypatch.setattr(cpu_attn.CPUAttentionMetadataBuilder, "__init__", built)
    for module in (vllm_attention, cpu_attn):
        monkeypatch.setattr(module, "get_layers_from_vllm_config", found)
    builder = Backend.get_builder_cls()(None, list(layers), W4A8, None)
    assert builder.isa == wanted
    assert {own.isa for own in layers.values()} == {wanted}


@pytest.mark.parametrize(
    ("own", "environment", "kind"),
    [
        (W4A8, "", OwnAttention),
        (config({"quant_method": "qqq"}, "qqq"), "", OwnAttention),
        (config(None, None), "always", StockAttention),
        (config({"quant_method": "gptq", "bits": 4}, "gptq"), "", StockAttention),
        (config({"quant_method": "gptq", "bits": 4}, "gptq"), "always", OwnAttention),
        (None, "", StockAttention),
    ],
)
def test_models_without_w4a8_layers_keep_vllms_attention(
    monkeypatch: pytest.MonkeyPatch, own: Any, environment: str, kind: type
) -> None:
    use(monkeypatch, own)
    monkeypatch.setenv("QTOOLKIT_W4A8", environment)
    assert Backend.get_impl_cls() is kind


def test_the_row_is_overridden_and_keeps_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.v1.attention.backends.registry._ATTN_OVERRIDES", {})
    vllm_attention.register_attention()
    vllm_attention.register_attention()
    assert AttentionBackendEnum.CPU_ATTN.get_class() is Backend
    assert Backend.get_name() == "CPU_ATTN"


@ours
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sliding_window": 128}, "a sliding window"),
        ({"alibi_slopes": [0.5] * HEADS}, "position biases"),
        ({"logits_soft_cap": 30.0}, "soft caps"),
        ({"sinks": torch.zeros(HEADS)}, "sinks"),
        ({"kv_cache_dtype": "fp8"}, "an fp8 cache"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "no decoder's attention"),
        ({"head_size": 80}, "80 elements"),
    ],
)
def test_what_the_kernel_does_not_know_stays_with_vllm(changes: dict[str, Any], words: str) -> None:
    assert words in layer(**changes).reason


@ours
def test_other_dtypes_stay_with_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, config(DECLARED, "compressed-tensors", torch.float32))
    assert "torch.float32" in layer().reason


def test_a_machine_without_the_kernel_leaves_it_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "failure", lambda: "no C++ compiler found")
    assert layer().reason == "no C++ compiler found"


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTOOLKIT_ATTENTION", "vllm")
    assert layer().reason == "QTOOLKIT_ATTENTION=vllm"


def test_an_unknown_attention_is_refused_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTOOLKIT_ATTENTION", "flash")
    with pytest.raises(RequestError, match="QTOOLKIT_ATTENTION=flash"):
        vllm_plugin.register()


@ours
def test_another_layout_of_the_cache_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    write = ops.cpu_attn_reshape_and_cache
    monkeypatch.setattr(
        ops, "cpu_attn_reshape_and_cache", lambda key, value, *rest, **more: write(value, key, *rest, **more)
    )
    vllm_attention.reads_pages.cache_clear()
    assert "lays its cache out" in layer().reason
    vllm_attention.reads_pages.cache_clear()


def test_graphs_with_our_operators_have_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_graphs.caching, "aot_compile_hash_factors", lambda config: ["vLLM's"])
    vllm_graphs.name_graphs()
    vllm_graphs.name_graphs()
    names = []
    for word in ("declared", "always"):
        monkeypatch.setenv("QTOOLKIT_W4A8", word)
        names.append(vllm_graphs.caching.aot_compile_hash_factors(W4A8))
    assert names == [["vLLM's", f"qtoolkit {__version__} {word}"] for word in ("declared", "always")]


def test_the_log_says_which_layers_and_why_not() -> None:
    assert line(["", ""]) == "qtoolkit: attention of 2 of 2 layers runs on our kernel."
    assert line(["", "it has sinks"]) == (
        "qtoolkit: attention of 1 of 2 layers runs on our kernel; not 1: it has sinks."
    )


class Engine:
    """A cache, and batches of sequences (queries, tokens) in it as vLLM's runner describes them."""

    def __init__(self, sequences: list[tuple[int, int]]) -> None:
        generator = torch.Generator().manual_seed(0)
        most = -(-max(length for _, length in sequences) // PAGE)
        self.pages = torch.zeros(len(sequences) * most, KEY_HEADS, PAGE, 2 * DIM, dtype=torch.bfloat16)
        self.layer = SimpleNamespace(isa="vec", _k_scale_float=1.0, _v_scale_float=1.0)
        table = torch.randperm(len(self.pages), generator=generator).int().view(len(sequences), most)
        starts = torch.tensor([0, *(queries for queries, _ in sequences)]).cumsum(0).int()
        lengths = torch.tensor([length for _, length in sequences]).int()
        for row, (_, length) in enumerate(sequences):
            token = torch.arange(length)
            slots = table[row, token // PAGE].long() * PAGE + token % PAGE
            key, value = torch.randn(2, length, KEY_HEADS, DIM, generator=generator).bfloat16()
            layer().do_kv_cache_update(self.layer, key, value, self.pages, slots)
        self.query = torch.randn(int(starts[-1]) + 1, HEADS, DIM, generator=generator).bfloat16()  # the last is padding
        plan = ops.cpu_attn_get_scheduler_metadata(
            len(sequences), HEADS, KEY_HEADS, DIM, lengths, torch.bfloat16, starts, True, -1, "vec", True
        )
        queries = max(queries for queries, _ in sequences)
        self.batch = CPUAttentionMetadata(
            int(starts[-1]), queries, starts, int(lengths.max()), lengths, table, torch.empty(0), plan
        )

    def decoded(self, kind: type[CPUAttentionBackendImpl]) -> tuple[Tensor, Tensor]:
        """Return one implementation's answer to single tokens whose keys and values come with them, and the cache."""
        lengths, table = self.batch.seq_lens, self.batch.block_table
        last = lengths.long() - 1
        self.batch.slot_mapping = table[torch.arange(len(last)), last // PAGE].long() * PAGE + last % PAGE
        wide = torch.randn(len(last), 3, KEY_HEADS, DIM, generator=torch.Generator().manual_seed(1)).bfloat16()
        key, value = wide[:, 0], wide[:, 2]  # as slices of one product lie
        pages, output = self.pages.clone(), torch.zeros_like(self.query)
        implementation = layer(kind)
        if kind is CPUAttentionBackendImpl:
            implementation.do_kv_cache_update(self.layer, key, value, pages, self.batch.slot_mapping)
        for _ in range(2):  # layers of one step: the second one finds what the first has made
            given = output[: len(last)], self.query[: len(last)]
            implementation.forward(self.layer, given[1], key, value, pages, self.batch, given[0])
        return output, pages

    def run(self, implementation: CPUAttentionBackendImpl) -> Tensor:
        """Return one implementation's answer."""
        output = torch.zeros_like(self.query)
        given: Any = None  # keys and values are in the cache
        answer = implementation.forward(self.layer, self.query, given, given, self.pages, self.batch, output)
        assert answer is output
        return output


BATCHES = {
    "a prompt": [(77, 77)],
    "a prompt's second part": [(50, 120)],
    "prompts and single tokens": [(1, 33), (40, 40), (1, 64), (3, 200)],
    "single tokens": [(1, 33), (1, 1), (1, 600)],
}


@ours
@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_equals_vllms_own_answer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    attend = library.attend
    monkeypatch.setattr(library, "attend", lambda *arguments: (calls.append(1), attend(*arguments)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # on larger machines single tokens would be vLLM's
    engine, implementation = Engine(BATCHES[name]), layer()
    calls.clear()  # the layer asked how the cache is laid out
    answer, expected = engine.run(implementation), engine.run(layer(CPUAttentionBackendImpl))
    assert calls == [1]
    # one step of bfloat16 between rounded results, and what rounding the weights does, which vLLM keeps in float32
    torch.testing.assert_close(answer, expected, rtol=2**-7, atol=2**-8)
    assert not answer[-1].any()  # padding


@ours
@pytest.mark.parametrize("kind", [OwnAttention, StockAttention])
@pytest.mark.parametrize("lengths", [[33], [1, 64, 65, 600]])
def test_a_layer_writes_its_cache_as_vllms_operator_does(
    kind: type[StockAttention], lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    engine = Engine([(1, length) for length in lengths])
    answer, pages = engine.decoded(kind)
    expected, expected_pages = Engine([(1, length) for length in lengths]).decoded(CPUAttentionBackendImpl)
    assert torch.equal(pages, expected_pages)
    torch.testing.assert_close(answer, expected, rtol=2**-7, atol=2**-8)  # as above
    assert hasattr(engine.batch, "qtoolkit_step") is (kind is OwnAttention)


@ours
def test_a_layer_that_reads_anothers_cache_writes_nothing() -> None:
    engine = Engine([(1, 33)])
    before = engine.pages.clone()
    engine.batch.slot_mapping = torch.tensor([0])
    given = torch.ones(1, KEY_HEADS, DIM).bfloat16()
    for kind in (OwnAttention, StockAttention):
        own = layer(kind, kv_sharing_target_layer_name="model.layers.0")
        own.forward(engine.layer, engine.query[:1], given, given, engine.pages, engine.batch, engine.query[:1].clone())
    assert torch.equal(engine.pages, before)


def test_a_batch_that_only_warms_up_has_no_cache_to_write() -> None:
    given, nothing = torch.zeros(1, HEADS, DIM).bfloat16(), torch.empty(0)
    for kind in (OwnAttention, StockAttention):
        assert layer(kind).forward(SimpleNamespace(isa="vec"), given, given, given, nothing, None, given) is given


@ours
@pytest.mark.parametrize(
    ("changes", "threads"),
    [({"causal": False}, 1), ({"dynamic_causal": torch.ones(1, dtype=torch.bool)}, 1), ({}, 5)],
)
def test_batches_that_are_not_causal_or_occupy_too_few_threads_are_vllms(
    changes: dict[str, Any], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    engine, implementation = Engine([(1, 33), (1, 64)]), layer()
    assert vllm_attention.takes(engine.batch, implementation) == (threads < 5)
    for name, value in changes.items():
        setattr(engine.batch, name, value)
    assert not vllm_attention.takes(engine.batch, implementation)


@ours
def test_single_tokens_of_heads_with_keys_of_their_own_are_vllms() -> None:
    own = layer(num_heads=KEY_HEADS)
    assert not vllm_attention.takes(Engine([(1, 33)]).batch, own)
    assert vllm_attention.takes(Engine([(2, 33)]).batch, own)


@ours
def test_pages_for_another_instruction_set_are_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine([(4, 4)])
    implementation = layer()
    monkeypatch.setattr(library, "attend", None)
    engine.layer.isa = "vec16"
    assert engine.run(implementation).shape == engine.query.shape
