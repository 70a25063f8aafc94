"""Gradients taken block by block, against autograd through the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tests_support import save_random
from torch import Tensor

from qtoolkit import architecture
from qtoolkit.calibration import capture, experts, gradients, outputs, smoothing
from qtoolkit.source import resolve
from qtoolkit.stages import Probe

LAYER = "self_attn.k_proj"


class Memory:
    """A store in memory."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, Tensor]] = {}

    def has(self, part: str) -> bool:
        return part in self.parts

    def save(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        assert part not in self.parts, "it is there already"
        self.parts[part] = {name: tensor.clone() for name, tensor in tensors.items()}

    def tensors(self, part: str) -> dict[str, Tensor]:
        return self.parts[part]

    def drop(self, part: str) -> None:
        self.parts.pop(part, None)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "qwen3_moe"])
def test_probes_and_metrics_are_those_of_autograd_through_the_model(tmp_path: Any, model_type: str) -> None:
    from transformers import AutoModelForCausalLM

    source = resolve(save_random(tmp_path / "model", model_type))
    skeleton = architecture.skeleton(source)
    tokens = torch.randint(2, 250, (3, 16), generator=torch.Generator().manual_seed(1))
    store = Memory()
    found = gradients.Gradients(skeleton, source, lambda s, i: skeleton.block(i, s), tokens, store)
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
        block = skeleton.block(index, source)
        found.tell(block, index)
        if block.experts:  # stored in bfloat16, and what comes from a later block's gradient is off by as much again
            probe = found.probe(index)
            torch.testing.assert_close(
                torch.cat(probe.gradients).float(), behind, rtol=0.03, atol=0.01 * float(behind.abs().max())
            )
            assert not block.metrics
        else:
            assert block.probe is None
            assert {*block.metrics} == {name for name, _ in block.linears()}
        metric = outputs.metrics(experts.around(block))[LAYER]
        flat = keys.flatten(0, 1).double()
        gram = flat.T @ flat
        wanted = gram / gram.diagonal().mean() + (outputs.DAMPING + len(gram) / 48) * torch.eye(len(gram))
        torch.testing.assert_close(metric.double(), wanted, rtol=0.05, atol=0.03)
    if model_type != "qwen3_moe":
        assert len(store.parts) == len(blocks)  # hidden states wait no longer than they are needed
    for index in range(len(blocks)):
        found.forget(index)
    found.measure()  # the first block's part is still there, and says that all was measured
    assert all(part.endswith("00000") for part in store.parts)


@pytest.mark.parametrize("why", ["too many outputs", "all stay in float"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_a_block_may_have_no_layer_with_a_metric(
    tmp_path: Any, model_type: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = resolve(save_random(tmp_path / "model", model_type))
    skeleton = architecture.skeleton(source)
    tokens = torch.randint(2, 250, (3, 16), generator=torch.Generator().manual_seed(1))

    def load(source: Any, index: int) -> Any:
        block = skeleton.block(index, source)
        if why == "all stay in float":
            block.refused |= dict.fromkeys(block.targets, why)
        return block

    if why == "too many outputs":
        monkeypatch.setattr(outputs, "LARGEST", 1)
    found = gradients.Gradients(skeleton, source, load, tokens, Memory())
    found.measure()
    for index in range(len(skeleton.blocks)):
        block = load(source, index)
        found.tell(block, index)
        assert outputs.metrics(experts.around(block)) == {}


def test_smoothing_takes_the_metrics_along(tmp_path: Any) -> None:
    source = resolve(save_random(tmp_path / "model", "qwen2"))  # whose layers have biases
    skeleton = architecture.skeleton(source)
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, 250, (4, 64), generator=draw)
    stream = capture.embed(skeleton, source, tokens)
    probe = Probe(stream, [torch.randn(batch.shape, generator=draw) for batch in stream.batches])
    block = skeleton.block(0, source)
    block.metrics = outputs.measured(block, probe, inputs=False)[1]
    before, applied = dict(block.metrics), {}
    for group in block.groups:
        rows = (
            block.linear(group.producers[0]).out_features
            if group.heads
            else block.linear(group.consumers[0]).in_features
        )
        scales = torch.rand(rows, generator=draw).add_(0.5)
        applied |= dict.fromkeys(group.producers, scales)
        if group.heads:  # every query head that reads a value head has its scales
            scales = scales.view(-1, block.head_dim).repeat_interleave(block.kv_repeats, dim=0).flatten()
        smoothing.fold(block, group, scales)
    for name, metric in outputs.measured(block, probe, inputs=False)[1].items():
        damping = (outputs.DAMPING + len(metric) / tokens.numel()) * torch.eye(len(metric))
        scales = applied.get(name, torch.ones(len(metric)))
        torch.testing.assert_close(block.metrics[name], before[name] * torch.outer(scales, scales))
        found = (before[name] - damping) * torch.outer(scales, scales)
        torch.testing.assert_close(found / found.diagonal().mean() + damping, metric, rtol=1e-3, atol=1e-4)
    assert {*applied} >= {"self_attn.v_proj", "mlp.up_proj"}


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
    store, sequences = Memory(), []
    monkeypatch.setattr(store, "drop", lambda part: sequences.append([x.shape[:2] for x in store.parts[part].values()]))
    gradients.Gradients(skeleton, source, lambda s, i: skeleton.block(i, s), tokens, store).measure()
    assert sequences == [[(2, 16), (2, 16)]] * len(skeleton.blocks)
