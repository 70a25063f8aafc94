"""The two runs of a block: what each layer gets in the quantized network and what it should have got."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests_support import save_random
from torch import Tensor, nn

from qtoolkit import architecture
from qtoolkit.calibration import capture, halves, twin
from qtoolkit.calibration.compensation import Compensate, CompensateOptions
from qtoolkit.scheme import Scheme
from qtoolkit.source import resolve
from qtoolkit.stages import Block, Context, Stream, Way
from qtoolkit.waiting import Waiting

TOKENS = torch.randint(2, 250, (6, 24), generator=torch.Generator().manual_seed(1))
CONTEXT = Context(Scheme(group_size=64), torch.bfloat16, print)


@pytest.fixture
def block_and_stream(tmp_path_factory: pytest.TempPathFactory) -> tuple[Block, Stream]:
    """The first block of a random model, and a stream that has drifted from the float one."""
    source = resolve(save_random(tmp_path_factory.mktemp("model") / "llama"))
    skeleton = architecture.skeleton(source)
    stream = capture.embed(skeleton, source, TOKENS)
    stream.floats = [batch * 1.05 for batch in stream.batches]
    return skeleton.block(0, source), stream


def test_the_drift_is_what_the_hidden_stream_lacks(block_and_stream: tuple[Block, Stream]) -> None:
    block, stream = block_and_stream
    originals = {name: layer.weight.data.clone() for name, layer in block.linears()}
    (found,) = twin.inputs(block, "self_attn.o_proj", stream, originals, 8)
    assert found.drift is not None
    torch.testing.assert_close(found.drift, 0.05 * stream.batches[0].flatten(0, 1), rtol=1e-3, atol=1e-6)
    (query,) = twin.inputs(block, "self_attn.q_proj", stream, originals, 8)
    assert query.drift is None  # it adds to nothing


def test_each_run_uses_its_own_weights_and_only_one_rounds(block_and_stream: tuple[Block, Stream]) -> None:
    block, stream = block_and_stream
    originals = {name: layer.weight.data.clone() for name, layer in block.linears()}
    changed = block.linear("mlp.up_proj")
    changed.weight.data = torch.zeros_like(changed.weight)
    (found,) = twin.inputs(block, "mlp.down_proj", stream, originals, 8)
    assert not found.seen.any()  # gate times an up projection of zeros
    expected: list[torch.Tensor] = []
    with twin.weights(block, originals):
        floats = Stream(stream.floats, stream.kwargs)
        capture.layer_inputs(block, floats, {"mlp.down_proj": expected.append})
    torch.testing.assert_close(found.wanted, expected[0])
    assert not changed.weight.any()  # and the block is left as it was


def test_after_compensation_the_block_is_nearer_to_the_float_one(block_and_stream: tuple[Block, Stream]) -> None:
    """The aim pays where it can: outputs against the float block's, on the tokens of calibration."""
    block, stream = block_and_stream
    originals = {name: layer.weight.data for name, layer in block.linears()}
    float_out = capture.advance(block, Stream(stream.floats, stream.kwargs)).batches[0]
    lost = {}
    for aim in (False, True):
        for name, weight in originals.items():
            block.linear(name).weight.data = weight
        report = Compensate(CompensateOptions(aim=aim)).apply(block, stream, CONTEXT)
        out = capture.advance(block, stream, bits=8).batches[0]
        lost[aim] = float((out - float_out).square().sum())
    assert lost[True] < 0.8 * lost[False]
    assert max(figures["aim_strength"] for figures in report.values()) > 0
    both = report["mlp.down_proj"]
    assert both["both_error"] == pytest.approx(both["weight_error"] + both["activation_error"], rel=0.2)


def test_the_same_stream_gives_the_same_codes(block_and_stream: tuple[Block, Stream]) -> None:
    block, stream = block_and_stream
    originals = {name: layer.weight.data for name, layer in block.linears()}
    codes = []
    for _ in range(2):
        for name, weight in originals.items():
            block.linear(name).weight.data = weight
        Compensate(CompensateOptions()).apply(block, stream, CONTEXT)
        codes.append({name: weight.codes for name, weight in block.quantized.items()})
    assert all(torch.equal(codes[0][name], codes[1][name]) for name in originals)


@pytest.mark.parametrize("whole", [True, False], ids=["its last layer's output", "more than that"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_stream_that_moves_ends_where_one_does_that_starts_anew_for_every_layer(
    tmp_path: Path, model_type: str, whole: bool
) -> None:
    """And what an MLP's last layer is given is kept where that layer's output is the MLP's."""
    source = resolve(save_random(tmp_path / "model", model_type))
    skeleton = architecture.skeleton(source)
    stream = capture.embed(skeleton, source, TOKENS)
    stream.floats = [batch * 1.01 for batch in stream.batches]
    block = halves.halve(skeleton.block(0, source))
    if not whole:
        scale(block.layer("mlp"))
    originals = {name: layer.weight.data for name, layer in block.linears()}
    floats_behind = capture.advance(block, Stream(stream.floats, stream.kwargs)).batches
    codes, behind = [], []
    for moves, waits in ((False, False), (True, False), (True, True)):
        for name, weight in originals.items():
            block.linear(name).weight.data = weight
        batches, floats = ([batch.clone() for batch in some] for some in (stream.batches, stream.floats))
        own = Stream(Waiting(tmp_path, batches) if waits else batches, stream.kwargs, floats)
        own.way, own.floats_way = Way(moves), Way(moves)
        Compensate(CompensateOptions()).apply(block, own, CONTEXT)
        codes.append({name: weight.codes.clone() for name, weight in block.quantized.items()})
        assert list(own.way.passed) == (["self_attn"] if moves else [])
        assert list(own.way.kept) == (["mlp"] if waits and whole else [])
        assert own.floats_way.behind is moves
        assert torch.equal(own.floats[0], floats_behind[0] if moves else stream.floats[0])
        behind.append(torch.cat(list(capture.advance(block, own, bits=8, spent=True).batches)))
    for others in codes[1:]:
        assert all(torch.equal(codes[0][name], others[name]) for name in codes[0])
    assert torch.equal(behind[0], behind[1])
    assert torch.equal(behind[0], behind[2])


def test_batches_share_what_is_the_same_for_all(tmp_path: Path) -> None:
    source = resolve(save_random(tmp_path / "model"))
    stream = capture.embed(architecture.skeleton(source), source, TOKENS, at_once=48)  # three batches
    first, *others = (kwargs["position_embeddings"] for kwargs in stream.kwargs)
    assert len(others) == 2
    assert all(mine is theirs for each in others for mine, theirs in zip(each, first, strict=True))
    changed = {"ids": torch.zeros(3), "many": (torch.ones(2), None), "cache": False}
    before = {"ids": torch.zeros(3), "many": (torch.zeros(2), None), "cache": True}
    found = capture.shared(changed, before)
    assert found["ids"] is before["ids"]
    assert found["many"][0] is changed["many"][0]
    assert found["cache"] is False


def scale(module: nn.Module) -> None:
    """Let ``module`` give half of what it gave."""
    kind = type(module)

    class Scaled(kind):  # type: ignore[misc, valid-type]
        def forward(self, hidden: Tensor) -> Tensor:
            return 0.5 * super().forward(hidden)

    module.__class__ = Scaled


def test_the_float_network_lets_go_of_the_parts_that_it_has_passed() -> None:
    stream = Stream([], {}, floats_way=Way(True, passed={"self_attn": torch.zeros(1)}))
    assert twin.left_behind(stream, "self_attn.q_proj")
    assert not any(twin.left_behind(stream, name) for name in ("self_attn_2.q_proj", "mlp.down_proj"))
    assert not twin.left_behind(Stream([], {}), "self_attn.q_proj")


def test_finite_sees_every_nan_and_inf_and_takes_no_tokens() -> None:
    good = torch.randn(7, 5)
    assert capture.finite(good)
    assert capture.finite(good[:0])
    for wrong in (float("nan"), float("inf"), float("-inf")):
        bad = good.clone()
        bad[3, 2] = wrong
        assert not capture.finite(bad)
