"""Gate and up reach the layer that takes them, and no other."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.fusion import fused_act_quant

from qtoolkit.kernels import ops, selection
from qtoolkit.serve import vllm_gate


class Act(SiluAndMul):
    """The activation without an engine's configuration around it."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_native(x)


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the test change vLLM's table, and put it back; our row stands for the class above."""
    monkeypatch.setattr(fused_act_quant, "_FUSED_ACT_QUANT", {})
    monkeypatch.setattr(vllm_gate, "ROW", (Act, vllm_gate.ROW[1]))
    vllm_gate.register_gate()
    vllm_gate.register_gate()


def test_a_layer_that_takes_gate_and_up_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_GATED", {"fused": None})
    linear, x = torch.nn.Module(), torch.randn(3, 8)
    vllm_gate.offer(linear, "fused")
    handed = fused_act_quant.maybe_fused_act_quant(Act(), x, linear)
    assert isinstance(handed, vllm_gate.GateAndUp)
    assert handed.x is x


def test_any_other_layer_gets_the_activation() -> None:
    linear, x = torch.nn.Module(), torch.randn(3, 8)
    vllm_gate.offer(linear, "neutral")
    assert torch.equal(fused_act_quant.maybe_fused_act_quant(Act(), x, linear), Act()(x))


def test_the_kernels_of_this_machine_say_whether_they_fuse() -> None:
    problem = selection.Problem(256, 64, 128, torch.bfloat16, "cpu")
    backend = selection.choose(problem).backend
    assert ops.fuses_gate(backend.layout) == (backend.name == "cpu")
