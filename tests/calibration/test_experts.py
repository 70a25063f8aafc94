"""Mixtures of experts: unfused they compute the same, each expert is fitted to its own tokens, all are stored alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests_support import MIXTURES, save_random
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import qtoolkit
from qtoolkit import architecture, checkpoint
from qtoolkit.architecture import Skeleton
from qtoolkit.calibration import capture, experts, smoothing
from qtoolkit.calibration.backward import backward
from qtoolkit.calibration.compensation import Compensate, CompensateOptions
from qtoolkit.calibration.hessian import shared_inputs
from qtoolkit.errors import ModelError, RequestError
from qtoolkit.experts import Experts
from qtoolkit.scheme import Scheme
from qtoolkit.source import Source, resolve
from qtoolkit.stages import Block, Context, Probe, Stream

CONTEXT = Context(Scheme(group_size=32), torch.bfloat16, print)
TOKENS = torch.randint(2, 258, (4, 24), generator=torch.Generator().manual_seed(1))
QUICK = {
    "calibration.samples": 4,
    "calibration.length": 32,
    "smooth.grid": 5,
    "scheme.group_size": 32,
    "outliers.method": "smooth",
}
ROUNDED = QUICK | {"gptq.compensate": False, "gptq.scale_search": False}  # column by column takes long


@pytest.fixture(scope="module", params=list(MIXTURES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Skeleton]:
    """A random mixture of eight experts, two a token."""
    folder = save_random(tmp_path_factory.mktemp("model") / request.param, request.param, initializer_range=0.08)
    source = resolve(folder)
    return source, architecture.skeleton(source)


@pytest.fixture
def block_and_stream(model: tuple[Source, Skeleton]) -> tuple[Block, Stream]:
    """Its first block and what that receives; each test gets its own."""
    source, skeleton = model
    return skeleton.block(0, source), capture.embed(skeleton, source, TOKENS)


def outputs(block: Block, stream: Stream) -> Tensor:
    return torch.cat(capture.advance(block, stream).batches)


def router(block: Block) -> Tensor:
    return block.linear("mlp.gate").weight.data


def test_unfused_experts_compute_what_transformers_fused_ones_do(model: tuple[Source, Skeleton]) -> None:
    source, skeleton = model
    options: dict[str, Any] = {"dtype": torch.float64, "experts_implementation": "eager"}
    stock = AutoModelForCausalLM.from_pretrained(source.path, **options)
    unfused = architecture.build(skeleton.config, skeleton.architecture, **options).to_empty(device="cpu")
    loaded = skeleton.architecture.loaded
    unfused.load_state_dict({loaded(name): source.read(name).double() for name in source.files})
    unfused.model.rotary_emb = type(unfused.model.rotary_emb)(skeleton.config)
    assert any(isinstance(module, Experts) for module in unfused.modules())
    with torch.inference_mode():
        expected, found = (each.eval()(TOKENS).logits for each in (stock, unfused))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)  # float64: gate and up may be one product


def test_folding_any_scales_leaves_the_block_s_function_and_scales_the_router(
    block_and_stream: tuple[Block, Stream],
) -> None:
    block, stream = block_and_stream
    before, weight = outputs(block, stream), router(block).clone()
    for group in block.groups:
        readers = block.linear(group.consumers[0]).in_features
        draw = torch.Generator().manual_seed(len(group.name))
        scales = 1.0 + torch.rand(readers, generator=draw)
        if group.heads:
            heads = scales.view(-1, block.kv_repeats, block.head_dim)
            scales = heads[:, :1].expand_as(heads).reshape(-1)
        smoothing.fold(block, group, scales)
    # fp32: each output is a sum of about 256 products, a few units in the last place apart
    torch.testing.assert_close(outputs(block, stream), before, rtol=2e-5, atol=2e-6)
    assert not torch.allclose(router(block), weight)


def test_the_range_of_the_experts_inputs_is_that_of_all_tokens(block_and_stream: tuple[Block, Stream]) -> None:
    block, stream = block_and_stream
    (group,) = (group for group in block.groups if group.name == "experts")
    largest = smoothing.input_ranges(block, [group], stream)["experts"]
    arrived = torch.cat(experts.arrivals(block, stream).hidden)
    torch.testing.assert_close(largest, arrived.abs().amax(dim=0))
    seen = torch.zeros_like(largest)
    capture.layer_inputs(block, stream, {group.consumers[-1]: lambda x: torch.maximum(seen, x.abs().amax(0), out=seen)})
    assert float(seen.max()) <= float(largest.max())
    assert (seen < largest).any()  # one expert alone would not have known


def test_smoothing_searches_every_group_and_keeps_the_function(block_and_stream: tuple[Block, Stream]) -> None:
    block, stream = block_and_stream
    before = outputs(block, stream)
    report = experts.apply(smoothing.Smooth(smoothing.SmoothOptions(grid=6)), block, stream, CONTEXT)
    assert set(report) == {group.name for group in block.groups}
    assert sum(name.startswith("experts.") for name in report) == 8
    torch.testing.assert_close(outputs(block, stream), before, rtol=1e-4, atol=1e-5)


def routed_tokens(block: Block, stream: Stream, expert: int) -> Tensor:
    """Return what an expert's first layer reads, independently of ``experts``: by a hook on the layer itself."""
    seen: list[Tensor] = []
    (name, *_) = (name for name in block.targets if name.startswith(f"mlp.experts.{expert}."))
    with capture.quantized_activations(block, 8):
        handle = block.layer(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()), prepend=True)
        capture.advance(block, stream)
        handle.remove()
    return torch.cat(seen) if seen else torch.empty(0, 128)


@pytest.mark.parametrize("few", [0, 10_000])
def test_each_expert_is_fitted_to_its_own_tokens_or_to_all_if_those_are_few(
    block_and_stream: tuple[Block, Stream], few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "FEW", few)
    block, stream = block_and_stream
    stream.floats = [batch + 0.001 for batch in stream.batches]
    fitted: dict[str, tuple[Tensor, Tensor]] = {}

    class Watch:
        """Notes what an expert's block is given."""

        reads_floats = True

        def apply(self, inner: Block, given: Stream, context: Context) -> dict[str, dict[str, float]]:
            if "experts." in inner.name:
                fitted[inner.name] = torch.cat(given.batches)[:, 0], torch.cat(given.floats)[:, 0]
            return {}

    experts.apply(Watch(), block, stream, CONTEXT)
    assert set(fitted) == {f"model.layers.0.mlp.experts.{number}" for number in range(8)}
    everything = torch.cat(experts.arrivals(block, stream).hidden)
    for number in range(8):
        seen, wanted = fitted[f"model.layers.0.mlp.experts.{number}"]
        assert seen.shape == wanted.shape  # tokens of both networks, one beside the other
        if few:
            assert seen.shape == everything.shape
        else:
            torch.testing.assert_close(seen, routed_tokens(block, stream, number), rtol=1e-5, atol=1e-6)
            assert 0 < float((seen - wanted).abs().mean()) < 0.2 * float(seen.abs().mean())


def test_what_the_loss_asks_of_an_expert_is_the_gradient_at_its_output(model: tuple[Source, Skeleton]) -> None:
    source, skeleton = model
    block, stream = skeleton.block(0, source), capture.embed(skeleton, source, TOKENS)
    draw = torch.Generator().manual_seed(2)
    block.probe = Probe(stream, [torch.randn(batch.shape, generator=draw) for batch in stream.batches])
    asked: dict[str, Probe | None] = {}

    class Watch:
        """Notes the probe of every block it is given."""

        reads_gradients = True

        def apply(self, inner: Block, given: Stream, context: Context) -> dict[str, dict[str, float]]:
            asked[inner.name] = inner.probe
            return {}

    experts.apply(Watch(), block, stream, CONTEXT)
    assert asked["model.layers.0"] is block.probe
    for number in range(8):
        down = f"mlp.experts.{number}.{skeleton.architecture.experts.down}"
        expected = torch.cat([found for _, found in backward(block, block.probe, (down,))])
        probe = asked[f"model.layers.0.mlp.experts.{number}"]
        torch.testing.assert_close(torch.cat(probe.gradients)[:, 0], expected, rtol=1e-4, atol=1e-6)
        inside = torch.cat([x.flatten(0, 1) for x in probe.stream.batches])
        assert inside.shape == (len(expected), 128)


def test_layers_that_share_an_expert_s_input_are_compensated_together(model: tuple[Source, Skeleton]) -> None:
    source, skeleton = model
    names = skeleton.architecture.experts
    assert names is not None
    for _, expert in experts.parts(skeleton.block(0, source)):
        assert [{*mates} for mates in shared_inputs(expert).values()] == [{names.gate, names.up}, {names.down}]
        assert [group.consumers for group in expert.groups if group.producers] == [(names.down,)]


def test_compensation_beats_rounding_on_every_expert(model: tuple[Source, Skeleton]) -> None:
    source, skeleton = model
    stream = capture.embed(skeleton, source, TOKENS)
    lost: dict[bool, dict[str, float]] = {}
    for compensate in (False, True):
        block = skeleton.block(0, source)
        step = Compensate(CompensateOptions(compensate=compensate, aim=False))
        report = experts.apply(step, block, stream, CONTEXT)
        assert set(report) == set(block.targets) == set(block.quantized)
        lost[compensate] = {name: figures["error"] for name, figures in report.items() if "experts" in name}
        for name, weight in block.quantized.items():
            assert torch.equal(weight.dequantize(), block.linear(name).weight.data)
    assert len(lost[True]) == 24
    assert all(error < lost[False][name] for name, error in lost[True].items())


def test_an_expert_nobody_asks_for_is_quantized_too_and_said(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", "qwen3_moe")
    source = resolve(folder)
    skeleton = architecture.skeleton(source)
    block, stream = skeleton.block(0, source), capture.embed(skeleton, source, TOKENS)
    router(block)[3:] = 0.0  # ties go to the first experts
    report = experts.apply(Compensate(CompensateOptions()), block, stream, CONTEXT)
    figures = report["mlp.experts.7.down_proj"]
    assert (figures["routed"], figures["tokens"]) == (0.0, float(TOKENS.numel()))
    assert 0 < figures["error"] < 0.1


def test_experts_are_stored_as_hub_checkpoints_name_them(model: tuple[Source, Skeleton], tmp_path: Path) -> None:
    source, skeleton = model
    result = qtoolkit.quantize(source.path, "w4a8", tmp_path / "out", changes=ROUNDED)
    packed = resolve(tmp_path / "out")
    layers = {name.rpartition(".")[0] for name in packed.files if name.endswith("weight_packed")}
    assert layers == {row["name"] for row in result.layers}
    assert all(f"{layer}.weight" in source.files for layer in layers)
    unpacked = {name for name in packed.files if name.rpartition(".")[0] not in layers}
    assert unpacked <= set(source.files)
    block = "model.layers.0.block_sparse_moe" if skeleton.architecture.renamed else "model.layers.0.mlp"
    assert {f"{block}.experts.7.{name}" for name in ("w1", "w2", "w3")} <= layers or (
        {f"{block}.experts.7.{name}_proj" for name in ("gate", "up", "down")} <= layers
    )
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert f"{block}.gate" in groups["ignore"]
    dense, mixture = groups["config_groups"].values()
    assert dense["input_activations"]["num_bits"] == 8
    assert mixture["input_activations"] is None  # with it, vLLM would look for weights in another layout

    with torch.inference_mode():
        simulated = qtoolkit.load(tmp_path / "out", activations=False)(TOKENS).logits
        served = qtoolkit.load(tmp_path / "out")(TOKENS).logits
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)(TOKENS).logits
        original = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.bfloat16)(TOKENS).logits
    scale = float(original.float().std())
    # a token whose router hesitates may go elsewhere for a last bit: hence medians
    assert float((stock - simulated).abs().float().median()) < 0.05 * scale
    assert float((simulated - served).abs().float().median()) < 0.05 * scale
    assert 0 < float((served - original).abs().float().median()) < 0.5 * scale


def test_experts_that_no_group_fits_stay_in_float_together(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", "qwen3_moe", moe_intermediate_size=48)  # no multiple of 32
    result = qtoolkit.quantize(folder, "w4a8", tmp_path / "out", changes=ROUNDED)
    assert len(result.layers) == 8  # attention
    assert len(result.unquantized) == 2 * 24
    assert any("experts are quantized together" in row["reason"] for row in result.unquantized)
    with torch.inference_mode():
        served = qtoolkit.load(tmp_path / "out")(TOKENS).logits
    assert served.isfinite().all()


def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", "mixtral", hidden_size=256, intermediate_size=256)  # products may be rough
    changes = {**QUICK, "calibration.samples": 16, "calibration.length": 64}
    tensors = load_file(folder / "model.safetensors")
    for name in [each for each in tensors if each.endswith("w3.weight")]:
        tensors[name][::16] *= 60.0  # what experts smooth
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    class Stop:
        def start(self, blocks: int, done: int) -> None: ...
        def say(self, text: str) -> None: ...
        def block(self, name: str, error: float) -> None:
            raise KeyboardInterrupt

    qtoolkit.quantize(folder, "w4a8", tmp_path / "whole", changes=changes)
    with pytest.raises(KeyboardInterrupt):
        qtoolkit.quantize(folder, "w4a8", tmp_path / "out", changes=changes, progress=Stop())
    assert (tmp_path / "out.partial").is_dir()
    qtoolkit.quantize(folder, "w4a8", tmp_path / "out", changes=changes)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_the_chained_grid_is_not_for_experts(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", "mixtral")
    changes = {**QUICK, "scheme.group_size": "channel", "gptq.chained": True}
    with pytest.raises(RequestError, match="engines run experts alike"):
        qtoolkit.quantize(folder, "w4a8", tmp_path / "out", changes=changes)


def test_a_size_budget_gives_experts_the_recipe_s_scheme(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", "qwen2_moe")
    changes = {**ROUNDED, "scheme.group_size": 64, "budget.bits": 4.6}
    qtoolkit.quantize(folder, "w4a8", tmp_path / "out", changes=changes)
    manifest = checkpoint.verify(tmp_path / "out")
    assert manifest.budget is not None
    assert manifest.budget.used <= 4.6
    schemes = {row.scheme for row in manifest.layers if ".experts." in row.name}
    assert schemes == {"W4A8-g64"}
    assert {row.scheme for row in manifest.layers} > schemes or manifest.unquantized


def test_a_linear_layer_that_no_file_names_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_random(tmp_path / "model", "qwen3")
    known = architecture.of("qwen3")
    poorer = known.model_copy(update={"targets": known.targets[1:]})
    monkeypatch.setattr(architecture, "of", lambda model_type: poorer)
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj"):
        architecture.skeleton(resolve(folder))


def test_blocks_may_be_dense_among_mixtures(tmp_path: Path) -> None:
    skeleton = architecture.skeleton(resolve(save_random(tmp_path / "model", "qwen2_moe")))
    mixture, dense = (skeleton.architecture.within(block) for block in skeleton.blocks)
    assert mixture.experts == "mlp.experts"
    assert "mlp.shared_expert.up_proj" in mixture.targets
    assert mixture.floats == ("mlp.gate", "mlp.shared_expert_gate")
    assert dense.experts == ""
    assert dense.targets[4:] == ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert dense.floats == ()
    assert isinstance(skeleton.blocks[0].mlp.experts, nn.ModuleList)
