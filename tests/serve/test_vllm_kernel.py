"""When the plugin's kernel takes a layer, and what it makes of the two layouts vLLM hands over."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS, choose_mp_linear_kernel
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
from vllm.platforms import PlatformEnum
from vllm.scalar_type import scalar_types

from qtoolkit.bridges import compressed
from qtoolkit.kernels import reference, selection
from qtoolkit.packing.int4 import pack_int4
from qtoolkit.scheme import Scheme
from qtoolkit.serve import vllm_kernel
from qtoolkit.serve.vllm_kernel import W4A8LinearKernel, neutral, place_first, refuse


def layer(**changes: Any) -> MPLinearLayerConfig:
    values: dict[str, Any] = {
        "full_weight_shape": (256, 512),
        "partition_weight_shape": (256, 512),
        "weight_type": scalar_types.uint4b8,
        "act_type": torch.bfloat16,
        "group_size": 128,
        "zero_points": False,
    }
    return MPLinearLayerConfig(**{**values, **changes})


def model(quantization: dict[str, Any] | None) -> Any:
    """Return as much of a vLLM config as the kernel looks at."""
    return SimpleNamespace(
        model_config=SimpleNamespace(model_arch_config=SimpleNamespace(quantization_config=quantization))
    )


W4A8 = model(compressed.config(Scheme(), ["lm_head"]))
GPTQ = model({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True})


@pytest.mark.parametrize("group_size", [128, -1])
def test_a_declared_layer_is_taken(group_size: int) -> None:
    assert refuse(layer(group_size=group_size), W4A8) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"zero_points": True}, "zero points"),
        ({"weight_type": scalar_types.uint8b128}, "wants symmetric int4"),
        ({"act_type": torch.int8}, "activations are torch.int8"),
        ({"partition_weight_shape": (192, 512)}, "192 inputs on this rank are not a multiple of the group size 128"),
    ],
)
def test_a_layer_that_cannot_run_is_refused_in_words(changes: dict[str, Any], words: str) -> None:
    assert words in str(refuse(layer(**changes), W4A8))


def test_an_undeclared_layer_is_left_to_vllm() -> None:
    assert "declares no int8 activations" in str(refuse(layer(), GPTQ))


def test_always_takes_an_undeclared_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTOOLKIT_W4A8", "always")
    assert refuse(layer(), GPTQ) is None


def test_off_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTOOLKIT_W4A8", "off")
    assert refuse(layer(), W4A8) == "QTOOLKIT_W4A8=off"


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave only the reference to run layers, as on a machine without a C++ compiler."""
    without = selection.Backend("cpu", "cpu-panel64", lambda problem: "no C++ compiler found", selection._keep)
    monkeypatch.setattr(selection, "backends", lambda: (without, selection.REFERENCE))


@pytest.mark.usefixtures("no_compiler")
def test_where_only_the_reference_runs_vllms_own_kernel_is_kept() -> None:
    reason = str(refuse(layer(), W4A8))
    assert "slower than vLLM's own" in reason
    assert "no C++ compiler found" in reason


@pytest.mark.usefixtures("no_compiler")
def test_always_takes_the_reference_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTOOLKIT_W4A8", "always")
    assert refuse(layer(), W4A8) is None


@pytest.mark.usefixtures("no_compiler")
def test_the_reference_is_better_than_no_kernel_at_all() -> None:
    odd = layer(full_weight_shape=(256, 40), partition_weight_shape=(256, 40))  # vLLM's wants multiples of 32
    assert refuse(odd, W4A8) is None


@pytest.fixture
def vllm_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the test change vLLM's kernel tables, and put them back."""
    for platform in vllm_kernel.PLATFORMS:
        monkeypatch.setitem(_POSSIBLE_KERNELS, platform, list(_POSSIBLE_KERNELS[platform]))


@pytest.mark.usefixtures("vllm_tables")
def test_the_kernel_stands_first_once_however_often_it_is_placed() -> None:
    place_first()
    place_first()
    for platform in (PlatformEnum.CPU, PlatformEnum.CUDA):
        assert _POSSIBLE_KERNELS[platform][0] is W4A8LinearKernel
        assert _POSSIBLE_KERNELS[platform].count(W4A8LinearKernel) == 1


@pytest.mark.usefixtures("vllm_tables")
@pytest.mark.parametrize(("config", "ours"), [(W4A8, True), (GPTQ, False)], ids=["declared", "undeclared"])
def test_vllm_chooses_the_kernel_for_declared_layers_only(
    monkeypatch: pytest.MonkeyPatch, config: Any, ours: bool
) -> None:
    place_first()
    monkeypatch.setattr(vllm_kernel, "get_current_vllm_config", lambda: config)
    assert (choose_mp_linear_kernel(layer()) is W4A8LinearKernel) == ours


def parameter(data: torch.Tensor, input_dim: int) -> torch.nn.Parameter:
    made = torch.nn.Parameter(data, requires_grad=False)
    made.input_dim = input_dim  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize("layout", ["gptq", "pack-quantized", "int-quantized"])
@pytest.mark.parametrize("group_size", [128, -1])
def test_every_layout_computes_what_the_reference_does(
    monkeypatch: pytest.MonkeyPatch, layout: str, group_size: int
) -> None:
    monkeypatch.setattr(vllm_kernel, "get_current_vllm_config", lambda: W4A8)
    torch.manual_seed(0)
    codes = torch.randint(-8, 8, (512, 256), dtype=torch.int8)
    scales = torch.rand(512, 2 if group_size == 128 else 1).bfloat16()
    stored = {
        "gptq": (pack_int4(codes).t().contiguous(), scales.t().contiguous(), 0),
        "pack-quantized": (pack_int4(codes), scales, 1),
        "int-quantized": (codes, scales, 1),
    }[layout]
    module = torch.nn.Module()
    module.q, module.s = parameter(stored[0], stored[2]), parameter(stored[1], stored[2])
    kernel = W4A8LinearKernel(layer(group_size=group_size), "q", "s")
    kernel.process_weights_after_loading(module)
    x, bias = torch.randn(3, 256).bfloat16(), torch.randn(512).bfloat16()
    expected = reference.w4a8_linear(x, codes, scales, bias, group_size)
    torch.testing.assert_close(kernel.apply_weights(module, x, bias), expected, rtol=2**-8, atol=0)


def test_neutral_turns_gptq_into_rows_of_outputs() -> None:
    codes = torch.randint(-8, 8, (16, 32), dtype=torch.int8)
    packed, scales = neutral(pack_int4(codes).t(), torch.ones(1, 16), group_major=True)
    assert torch.equal(packed, pack_int4(codes))
    assert scales.shape == (16, 1)
