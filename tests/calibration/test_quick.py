"""Modules that compute in one pass: only where they give the same, and only while nobody wants a gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from qtoolkit.calibration import quick
from qtoolkit.kernels.cpu.rounding import library as native
from qtoolkit.stages import Block

pytestmark = pytest.mark.skipif(native.failure() is not None, reason="no native loops here")


class Both(nn.Module):
    def __init__(self, activation: str = "silu") -> None:
        super().__init__()
        config = LlamaConfig(hidden_size=48, intermediate_size=80, num_attention_heads=4, hidden_act=activation)
        self.norm, self.mlp = LlamaRMSNorm(48), LlamaMLP(config)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x))


def hastened(module: nn.Module) -> Block:
    return quick.hasten(Block("block", module, (), ()))


def test_a_norm_and_an_mlp_give_what_they_gave() -> None:
    module, x = Both(), torch.randn(3, 7, 48)
    with torch.inference_mode():
        wanted = module(x)
        hastened(module)
        found = module(x)
    assert isinstance(module.norm, LlamaRMSNorm)
    assert isinstance(module.norm, quick._Norm)
    assert isinstance(module.mlp, LlamaMLP)
    assert isinstance(module.mlp, quick._Gated)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_hooks_and_new_weights_count() -> None:
    module, seen = hastened(Both()).module, []
    module.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    module.norm.weight.data.mul_(2.0)
    x = torch.randn(1, 4, 48)
    with torch.inference_mode():
        found = module(x)
    wanted = Both()
    wanted.load_state_dict(module.state_dict())
    torch.testing.assert_close(found, wanted(x).detach(), rtol=1e-5, atol=1e-6)
    assert seen[0].shape == (1, 4, 80)


def test_gradients_pass() -> None:
    module, x = Both(), torch.randn(2, 48, requires_grad=True)
    (wanted,) = torch.autograd.grad(module(x).square().sum(), x)
    (found,) = torch.autograd.grad(hastened(module).module(x).square().sum(), x)
    assert torch.equal(found, wanted)


def test_what_gives_something_else_stays() -> None:
    module = Both("gelu")
    module.norm = GemmaRMSNorm(48)  # one plus its weight
    module.norm.variance_epsilon = module.norm.eps
    nn.init.normal_(module.norm.weight)
    hastened(module)
    assert type(module.norm) is GemmaRMSNorm
    assert type(module.mlp) is LlamaMLP


def test_an_mlp_that_wants_more_than_a_hidden_state_stays() -> None:
    class Other(LlamaMLP):
        def forward(self, x: Tensor, experts: Tensor) -> Tensor:
            return super().forward(x) * experts

    module = Other(LlamaConfig(hidden_size=48, intermediate_size=80, num_attention_heads=4))
    hastened(module)
    assert type(module) is Other


def test_a_norm_that_takes_the_mean_away_and_a_gate_with_a_limit_stay() -> None:
    class Centred(LlamaRMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(dim=-1, keepdim=True))

    class Limited(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7.0)) * self.up_proj(x).clamp(-7.0, 7.0))

    module = Both()
    module.norm = Centred(48)
    module.mlp = Limited(LlamaConfig(hidden_size=48, intermediate_size=80, num_attention_heads=4))
    hastened(module)
    assert type(module.norm) is Centred
    assert type(module.mlp) is Limited


def test_another_call_is_the_modules_own_and_twice_is_once() -> None:
    class WithGate(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
            return super().forward(hidden_states if gate is None else hidden_states * gate)

    module, x, gate = WithGate(48), torch.randn(2, 3, 48), torch.rand(2, 3, 48)
    wanted = module(x, gate)
    hastened(module)
    kind = type(module)
    assert type(hastened(module).module) is kind
    with torch.inference_mode():
        assert torch.equal(module(x, gate), wanted)
        assert torch.equal(module(hidden_states=x, gate=gate), wanted)
