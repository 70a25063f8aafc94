"""When the plugin runs a mixture's experts, and that they then compute what the reference does."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("vllm")

from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe import (
    CompressedTensorsMoEMethod,
)

from qtoolkit.kernels import reference
from qtoolkit.packing.int4 import pack_int4
from qtoolkit.serve import vllm_experts
from qtoolkit.serve.vllm_experts import W4A8ExpertsMethod, refuse, register_experts

NAME = "model.layers.0.mlp.experts"
EXPERTS, HIDDEN, INNER, TOP = 6, 64, 32, 2


def scheme(**changes: Any) -> dict[str, Any]:
    """Return as much of what vLLM finds in a config group as is looked at."""
    values = {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 32, **changes}
    return {"weights": SimpleNamespace(**values), "input_activations": None, "format": "pack-quantized"}


def layer(**changes: Any) -> Any:
    """Return as much of vLLM's experts as is looked at; ``changes`` are those of the layer or of its config."""
    parallel = SimpleNamespace(use_ep=changes.pop("use_ep", False))
    moe = SimpleNamespace(
        moe_parallel_config=parallel,
        has_bias=changes.pop("has_bias", False),
        in_dtype=torch.float32,
        intermediate_size_per_partition=INNER,
    )
    own = {"moe_config": moe, "activation": MoEActivation.SILU, "apply_router_weight_on_input": False, **changes}
    return SimpleNamespace(**own)


@pytest.fixture
def declaring(monkeypatch: pytest.MonkeyPatch) -> None:
    """The served checkpoint's manifest says that its experts run W4A8."""
    monkeypatch.setattr(vllm_experts, "declared", lambda name: True)


@pytest.mark.usefixtures("declaring")
def test_declared_experts_are_taken_and_others_refused_in_words() -> None:
    assert refuse(scheme(), layer(), NAME) is None
    for found, given, words in (
        (None, layer(), "not quantized in the checkpoint"),
        (scheme(num_bits=8), layer(), "not packed symmetric int4"),
        (scheme(symmetric=False), layer(), "not packed symmetric int4"),
        (scheme(), layer(has_bias=True), "without bias"),
        (scheme(), layer(activation=MoEActivation.GELU), "silu"),
        (scheme(), layer(use_ep=True), "expert parallelism"),
    ):
        assert words in str(refuse(found, given, NAME))


def test_what_the_manifest_does_not_declare_is_taken_on_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_experts, "declared", lambda name: False)
    assert "QTOOLKIT_W4A8=always" in str(refuse(scheme(), layer(), NAME))
    monkeypatch.setenv("QTOOLKIT_W4A8", "always")
    assert refuse(scheme(), layer(), NAME) is None


def test_the_manifest_beside_the_weights_is_what_declares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"name": f"{NAME}.0.gate_proj", "scheme": "W4A8-g128"}, {"name": "model.layers.1.mlp.experts.0.up_proj"}]
    rows[1]["scheme"] = "W8A8-channel"
    (tmp_path / "qtoolkit.json").write_text(json.dumps({"layers": rows}))
    served = SimpleNamespace(model_config=SimpleNamespace(model=str(tmp_path), revision=None))
    monkeypatch.setattr(vllm_experts, "get_current_vllm_config", lambda: served)
    assert vllm_experts.declared(NAME)
    assert not vllm_experts.declared("model.layers.1.mlp.experts")
    assert not vllm_experts.declared("model.layers.0.mlp.exp")


@pytest.mark.parametrize("group_size", [32, None])
def test_chosen_experts_outputs_are_weighted_and_summed(group_size: int | None) -> None:
    draw = torch.Generator().manual_seed(0)

    def weights(n: int, k: int) -> tuple[Tensor, Tensor]:
        codes = torch.randint(-8, 8, (EXPERTS, n, k), generator=draw, dtype=torch.int8)
        scales = torch.rand(EXPERTS, n, k // group_size if group_size else 1, generator=draw) * 0.01 + 0.001
        return codes, scales

    (first, first_scales), (second, second_scales) = weights(2 * INNER, HIDDEN), weights(HIDDEN, INNER)
    loaded = nn.Module()
    for name, codes, scales in (("w13", first, first_scales), ("w2", second, second_scales)):
        packed = torch.stack([pack_int4(expert) for expert in codes])
        loaded.register_parameter(f"{name}_weight_packed", nn.Parameter(packed, requires_grad=False))
        loaded.register_parameter(f"{name}_weight_scale", nn.Parameter(scales, requires_grad=False))
    strategy = "group" if group_size else "channel"
    method = W4A8ExpertsMethod(SimpleNamespace(strategy=strategy, group_size=group_size), layer())
    method.process_weights_after_loading(loaded)
    assert {name for name, _ in loaded.named_parameters()} == {
        f"{name}_{part}" for name in ("w13", "w2") for part in ("weight_packed", "weight_scale")
    }  # one copy of the weights, not two

    x = torch.randn(7, HIDDEN, generator=draw)
    chosen = torch.stack([torch.randperm(EXPERTS - 1, generator=draw)[:TOP] for _ in x])  # the last expert has none
    share = torch.rand(7, TOP, generator=draw)
    size, expected = group_size or -1, torch.zeros(7, HIDDEN)
    for token, (row, ids) in enumerate(zip(x, chosen.tolist(), strict=True)):
        for place, e in enumerate(ids):
            both = reference.w4a8_linear(row[None], first[e], first_scales[e], None, size)
            made = reference.w4a8_linear(reference.silu_and_mul(both), second[e], second_scales[e], None, size)
            expected[token] += share[token, place] * made[0]
    found = method.apply(loaded, x, share, chosen.to(torch.int32), None, None)
    torch.testing.assert_close(
        found, expected, rtol=1e-5, atol=1e-6
    )  # the two sums of TOP terms may be in other orders


def test_registering_twice_wraps_once() -> None:
    register_experts()
    once = CompressedTensorsMoEMethod.get_moe_method
    register_experts()
    assert CompressedTensorsMoEMethod.get_moe_method is once
