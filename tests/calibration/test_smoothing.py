"""Smoothing against an independent float64 formulation, and the promise that folding changes nothing."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests_support import save_random

from qtoolkit import architecture
from qtoolkit.calibration import capture, grid, smoothing
from qtoolkit.scheme import Scheme
from qtoolkit.source import resolve
from qtoolkit.stages import Block, ChannelGroup, Context, Stream

CONTEXT = Context(Scheme(group_size=64), torch.bfloat16, print)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def block_and_stream(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Block, Stream]:
    """The first block of a random model (grouped-query attention, biases or q/k norms), and what it receives."""
    folder = save_random(tmp_path_factory.mktemp("model") / request.param, request.param)
    source = resolve(folder)
    skeleton = architecture.skeleton(source)
    tokens = torch.randint(2, 258, (3, 24), generator=torch.Generator().manual_seed(1))
    return skeleton.block(0, source), capture.embed(skeleton, source, tokens)


def outputs(block: Block, stream: Stream) -> torch.Tensor:
    return torch.cat(capture.advance(block, stream).batches)


def test_folding_any_scales_leaves_the_block_s_function(block_and_stream: tuple[Block, Stream]) -> None:
    block, stream = block_and_stream
    before = outputs(block, stream)
    for group in block.groups:
        largest = smoothing.input_ranges(block, [group], stream)[group.name]  # tied across a key/value head's readers
        smoothing.fold(block, group, 1.0 + largest)
    # fp32: each output is a sum of about 256 products, a few units in the last place apart
    torch.testing.assert_close(outputs(block, stream), before, rtol=2e-5, atol=2e-6)


def test_value_scales_are_shared_by_the_query_heads_that_read_them(block_and_stream: tuple[Block, Stream]) -> None:
    block, stream = block_and_stream
    group = next(group for group in block.groups if group.heads)
    heads = smoothing.input_ranges(block, [group], stream)[group.name].view(-1, block.kv_repeats, block.head_dim)
    assert torch.equal(heads, heads[:, :1].expand_as(heads))
    assert heads.shape[1] == 2


def test_the_loss_is_the_one_of_the_paper(block_and_stream: tuple[Block, Stream]) -> None:
    block, stream = block_and_stream
    group = next(group for group in block.groups if group.name == "down_proj")
    calls = smoothing.record(block, group, stream, tokens=72)
    scales = smoothing.input_ranges(block, [group], stream)[group.name] / 0.01 + 1
    loss = smoothing.group_loss(block, group, calls, scales, CONTEXT)

    weight = block.linear("mlp.down_proj").weight.double()
    total = 0.0
    for call in calls:
        for x in call.args[0].double().flatten(0, 1):
            smooth = x / scales
            a = smooth.abs().max() / 127
            xq = (smooth / a).round() * a
            w = (weight * scales).view(weight.shape[0], -1, 64)
            s = w.abs().amax(-1, keepdim=True) / 7
            wq = ((w / s).round().clamp(-8, 7) * s).flatten(1)
            total += float(((wq @ xq - weight @ x) ** 2).sum())
    assert loss == pytest.approx(total / 72, rel=1e-3)  # rounding ties fall differently in fp32 and fp64


def test_trials_share_their_room(block_and_stream: tuple[Block, Stream]) -> None:
    block, stream = block_and_stream
    group = next(group for group in block.groups if group.name == "down_proj")
    calls = smoothing.record(block, group, stream, tokens=72)
    largest = smoothing.input_ranges(block, [group], stream)[group.name]
    room = {name: torch.full_like(block.linear(name).weight, torch.nan) for name in group.consumers}
    several = [largest / 0.01 + 1, largest + 1]
    shared = [smoothing.group_loss(block, group, calls, scales, CONTEXT, room) for scales in several]
    assert shared == [smoothing.group_loss(block, group, calls, scales, CONTEXT) for scales in several]
    assert shared[0] != shared[1]
    assert all(made.isfinite().all() for made in room.values())


def test_thresholds_are_judged_on_text_from_every_batch(block_and_stream: tuple[Block, Stream]) -> None:
    block, stream = block_and_stream
    group = next(group for group in block.groups if group.name == "down_proj")
    parts = Stream([part for batch in stream.batches for part in batch.split(1)], [*stream.kwargs] * 3)  # 3 batches
    whole = smoothing.record(block, group, parts, tokens=1000)
    some = smoothing.record(block, group, parts, tokens=2 * 24)
    assert [len(call.args[0]) for call in whole] == [1, 1, 1]
    assert len(some) == 2
    for early, call in zip(some, whole, strict=False):  # what follows the text is not among a few
        torch.testing.assert_close(early.expected, call.expected)
    together = smoothing.record(block, group, stream, tokens=2 * 24)  # one batch of three: its first two
    torch.testing.assert_close(together[0].expected, torch.cat([call.expected for call in whole[:2]]))


def test_the_search_never_ends_worse_than_no_smoothing(block_and_stream: tuple[Block, Stream]) -> None:
    block, stream = block_and_stream
    report = smoothing.Smooth(smoothing.SmoothOptions(grid=12)).apply(block, stream, CONTEXT)
    assert set(report) == {"qkv", "o_proj", "up_and_gate", "down_proj"}
    for figures in report.values():
        assert figures["loss"] <= figures["loss_unsmoothed"]
        assert figures["largest_scale"] >= 1.0


def test_the_search_tries_no_scales_twice(
    block_and_stream: tuple[Block, Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    block, stream = block_and_stream
    tried: list[tuple[str, tuple[float, ...]]] = []
    loss = smoothing.group_loss

    def counted(
        block: Block, group: ChannelGroup, calls: list[smoothing.Call], scales: torch.Tensor, *rest: Any
    ) -> float:
        tried.append((group.name, tuple(scales.tolist())))
        return loss(block, group, calls, scales, *rest)

    monkeypatch.setattr(smoothing, "group_loss", counted)
    smoothing.Smooth(smoothing.SmoothOptions(grid=400)).apply(block, stream, CONTEXT)  # powers of two: fewer differ
    assert len(tried) == len(set(tried)) > 4


def test_smoothing_changes_no_bit_of_what_the_block_computes(block_and_stream: tuple[Block, Stream]) -> None:
    block, stream = block_and_stream
    for group in block.groups:
        scales = torch.ones(block.linear(group.consumers[0]).in_features)
        scales[:: block.head_dim] = 1 / 50  # outliers; of values in every head, since heads share them
        smoothing.fold(block, group, scales)
    before = outputs(block, stream)
    weights = {name: parameter.clone() for name, parameter in block.module.named_parameters()}
    figures = smoothing.Smooth(smoothing.SmoothOptions(grid=60)).apply(block, stream, CONTEXT)
    assert max(group["largest_scale"] for group in figures.values()) > 8
    assert any(not torch.equal(weights[name], parameter) for name, parameter in block.module.named_parameters())
    assert torch.equal(outputs(block, stream), before)


def test_channels_that_are_always_zero_are_left_alone(block_and_stream: tuple[Block, Stream]) -> None:
    block, stream = block_and_stream
    block = replace(block, module=deepcopy(block.module))
    block.linear("mlp.up_proj").weight.data.zero_()
    before = block.linear("mlp.down_proj").weight.clone()
    figures = smoothing.Smooth(smoothing.SmoothOptions(grid=12)).apply(block, stream, CONTEXT)["down_proj"]
    assert figures == {
        "threshold": 0.0, "largest_input": 0.0, "loss": 0.0, "loss_unsmoothed": 0.0, "largest_scale": 1.0,
    }  # fmt: skip
    assert torch.equal(block.linear("mlp.down_proj").weight, before)


def test_powers_of_two_are_the_nearest_by_ratio() -> None:
    scales = torch.tensor([1.0, 1.41, 1.42, 2.0, 2.9, 1e6, 0.3])
    assert smoothing.powers(scales).tolist() == [1.0, 1.0, 2.0, 2.0, 4.0, 2.0**20, 0.25]


def test_rounding_errs_by_half_a_step_at_most() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    rounded = grid.rounded(weight, CONTEXT.scheme)
    assert 0 < float((rounded - weight).abs().max()) <= float(weight.abs().max()) / 14 * 1.0001  # half a step of 1/7


def test_an_outlier_channel_is_smoothed_away(block_and_stream: tuple[Block, Stream]) -> None:
    block, stream = block_and_stream
    before = outputs(block, stream)
    group = next(group for group in block.groups if group.name == "up_and_gate")
    scales = torch.ones(block.linear(group.consumers[0]).in_features)
    scales[5] = 1 / 50
    smoothing.fold(block, group, scales)  # channel 5 grows 50-fold, its readers shrink: the function stays
    report = smoothing.Smooth(smoothing.SmoothOptions(grid=60)).apply(block, stream, CONTEXT)["up_and_gate"]
    assert report["largest_scale"] > 5
    assert report["loss"] < 0.5 * report["loss_unsmoothed"]
    torch.testing.assert_close(outputs(block, stream), before, rtol=1e-4, atol=1e-5)


def test_a_search_begins_with_thresholds_that_fall_by_the_same_part() -> None:
    places = smoothing.coarse(100.0, 0.1, 1000)
    assert places == sorted({*places})
    assert places[0] == 0
    found = [100.0 - 99.9 * place / 1000 for place in places]
    for i in range(smoothing.COARSE):
        wanted = 100.0 * 0.001 ** (i / smoothing.COARSE)
        assert min(abs(wanted - threshold) for threshold in found) < 0.051  # half a step
    assert smoothing.coarse(0.0, 0.0, 100) == [0]  # a dead input
