"""Gradients taken block by block, against autograd through the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tests_support import save_random
from torch import Tensor

from qtoolkit import architecture
from qtoolkit.calibration import gradients, outputs
from qtoolkit.source import resolve

LAYER = "self_attn.k_proj"


class Memory:
    """A store in memory."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, Tensor]] = {}

    def has(self, part: str) -> bool:
        return part in self.parts

    def save(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        assert part not in self.parts
        self.parts[part] = dict(tensors)

    def tensors(self, part: str) -> dict[str, Tensor]:
        return self.parts[part]


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_probes_and_metrics_are_those_of_autograd_through_the_model(tmp_path: Any, model_type: str) -> None:
    from transformers import AutoModelForCausalLM

    source = resolve(save_random(tmp_path / "model", model_type))
    skeleton = architecture.skeleton(source)
    tokens = torch.randint(2, 250, (3, 16), generator=torch.Generator().manual_seed(1))
    found = gradients.Gradients(skeleton, source, lambda s, i: skeleton.block(i, s), tokens, Memory())
    found.measure()
    found.measure()  # what is there is not measured again: the store would refuse

    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
    caught: list[Tensor] = []

    def catch(module: Any, args: Any, out: Any) -> None:
        caught.append(out[0] if isinstance(out, tuple) else out)
        caught[-1].retain_grad()

    blocks = model.get_submodule(skeleton.architecture.blocks)
    for block in blocks:
        block.register_forward_hook(catch)
        block.get_submodule(LAYER).register_forward_hook(catch)
    logits = model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
    drawn = gradients.drawn(logits.detach().softmax(-1), torch.Generator().manual_seed(0))
    (-logits.log_softmax(-1).gather(1, drawn).sum()).backward()
    for index in range(len(blocks)):
        keys, behind = (each.grad for each in caught[2 * index : 2 * index + 2])
        assert keys is not None
        assert behind is not None
        probe = found.probe(index)
        # stored in bfloat16, and what comes from a later block's bfloat16 gradient is off by as much again
        torch.testing.assert_close(
            torch.cat(probe.gradients).float(), behind, rtol=0.03, atol=0.01 * float(behind.abs().max())
        )
        block = skeleton.block(index, source)
        block.probe = probe
        metric = outputs.metrics(block)[LAYER]
        flat = keys.flatten(0, 1).double()
        gram = flat.T @ flat
        wanted = gram / gram.diagonal().mean() + (outputs.DAMPING + len(gram) / 48) * torch.eye(len(gram))
        torch.testing.assert_close(metric.double(), wanted, rtol=0.05, atol=0.03)


def test_tokens_are_drawn_as_often_as_their_odds_say() -> None:
    odds = torch.tensor([0.0, 0.1, 0.0, 0.6, 0.3, 0.0]).repeat(20000, 1)
    found = gradients.drawn(odds, torch.Generator().manual_seed(0))
    assert found.shape == (20000, 1)
    often = torch.bincount(found.flatten(), minlength=6) / len(odds)
    assert often[[0, 2, 5]].sum() == 0
    torch.testing.assert_close(often, odds[0], rtol=0, atol=0.01)  # three standard deviations


def test_a_block_without_a_probe_has_no_metric_and_only_heads_are_rounded_by_channel(tmp_path: Any) -> None:
    source = resolve(save_random(tmp_path / "model"))
    block = architecture.skeleton(source).block(0, source)
    assert outputs.metrics(block) == {}
    found = {name: outputs.heads(block, name) for name in block.targets}
    assert {name for name, size in found.items() if size} == {f"self_attn.{x}_proj" for x in "qkv"}


def test_few_sequences_of_a_long_text_are_probed(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve(save_random(tmp_path / "model"))
    skeleton = architecture.skeleton(source)
    monkeypatch.setattr(gradients, "TOKENS", 64)
    monkeypatch.setattr(gradients, "AT_ONCE", 32)
    tokens = torch.randint(2, 250, (16, 16), generator=torch.Generator().manual_seed(1))
    found = gradients.Gradients(skeleton, source, lambda s, i: skeleton.block(i, s), tokens, Memory())
    found.measure()
    assert found.probe(0).stream.shapes() == [(2, 16), (2, 16)]
