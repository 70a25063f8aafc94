"""The size budget: the allocation against every possible one, and checkpoints that keep to it and load everywhere."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests_support import save_random
from transformers import AutoModelForCausalLM

import qtoolkit
from qtoolkit import architecture, checkpoint
from qtoolkit.calibration import budget, trial
from qtoolkit.calibration.budget import Unit, allocate, between, spend
from qtoolkit.calibration.compensation import Compensate, CompensateOptions
from qtoolkit.errors import RequestError
from qtoolkit.int8 import W8A8Linear
from qtoolkit.runtime import W4A8Linear
from qtoolkit.scheme import Scheme
from qtoolkit.source import resolve
from qtoolkit.stages import Context

QUICK = {
    "calibration.samples": 4,
    "calibration.length": 32,
    "scheme.group_size": 64,
    "outliers.method": "none",
}
BITS = {"W4A8-g64": 4.25, "W8A8-channel": 8.125, "float": 16.0}


def units(count: int, seed: int) -> list[Unit]:
    draw = random.Random(seed)
    found = []
    for index in range(count):
        weights, loss = draw.choice([256, 512, 768]), draw.random()
        losses = dict(zip(BITS, (loss, loss * draw.uniform(0.005, 0.2), 0.0), strict=True))
        bits = {kind: weights * value for kind, value in BITS.items()}
        found.append(Unit((f"layer.{index}",), weights, bits, losses))
    return found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [4.5, 6.0, 10.0])
def test_the_allocation_is_near_the_best_of_all(seed: int, budget: float) -> None:
    some = units(6, seed)
    total = sum(unit.weights for unit in some)
    kinds = allocate(some, budget)

    def loss(kinds: tuple[str, ...] | list[str]) -> float:
        return sum(unit.loss[kind] for unit, kind in zip(some, kinds, strict=True))

    def bits(kinds: tuple[str, ...] | list[str]) -> float:
        return sum(unit.bits[kind] for unit, kind in zip(some, kinds, strict=True)) / total

    best = min(loss(way) for way in itertools.product(BITS, repeat=6) if bits(way) <= budget)
    assert bits(kinds) <= budget
    # a step that does not fit is all that a greedy choice can miss: never more than one unit's loss
    assert loss(kinds) <= best + max(unit.loss["W4A8-g64"] for unit in some)
    assert loss(kinds) <= 1.5 * best + 0.2


def test_more_bits_never_lose_more_and_all_bits_lose_nothing() -> None:
    some = units(12, 3)
    losses = [sum(row.loss[row.kind] for row in spend(some, budget).rows) for budget in (4.25, 4.5, 5, 6, 8, 12, 16)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0


def test_a_budget_below_int4_is_refused_with_what_int4_takes() -> None:
    with pytest.raises(RequestError, match=r"4 bits a weight is too small: W4A8-g64 alone takes 4\.250"):
        allocate(units(3, 0), 4.0)


def test_what_was_not_measured_lies_between_its_neighbours() -> None:
    known = {1: 1.0, 5: 16.0}
    assert between(known, 3) == pytest.approx(4.0)
    assert between(known, 0) == 1.0
    assert between(known, 9) == 16.0


@pytest.mark.parametrize("sensitive", [(0, "self_attn.o_proj"), (1, "mlp.down_proj")])
def test_a_unit_loses_what_the_whole_model_loses_by_it_alone(sensitive: tuple[int, str], tmp_path: Path) -> None:
    """All layers but one lie on the int4 grid, so that a block's divergence is that layer's, and activations'."""
    place, name = sensitive
    folder = save_random(tmp_path / "model")
    file, draw = folder / "model.safetensors", torch.Generator().manual_seed(1)
    state = {key: tensor.float() for key, tensor in load_file(file).items()}
    one = f"model.layers.{place}.{name}.weight"
    for key, weight in state.items():
        if "proj" in key:
            grid = torch.randint(-7, 8, weight.shape, generator=draw) * 2.0**-6
            grid[:, ::64] = 7 * 2.0**-6  # each group's largest: its scale is 2^-6
            state[key] = grid if key != one else weight * 4
    state["lm_head.weight"] *= 8
    save_file(state, file, metadata={"format": "pt"})
    source, tokens = resolve(folder), torch.randint(2, 258, (8, 64), generator=draw)
    skeleton = architecture.skeleton(source)
    options = CompensateOptions(compensate=False, scale_search=False, aim=False, couple=False)
    context = Context(Scheme(group_size=64), torch.float32, lambda _: None)
    units = budget.measure(
        skeleton, source, {"gptq": Compensate(options)}, lambda s, i: skeleton.block(i, s), tokens, context
    )
    found = {layer: unit.loss[context.scheme.name] for unit in units for layer in unit.layers}
    assert max(found, key=found.__getitem__) == one.removesuffix(".weight")

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    held = trial.split(tokens)[1]
    with torch.inference_mode():
        before = model(held).logits.log_softmax(-1)
        layer = model.get_submodule(one.removesuffix(".weight"))
        steps = state[one].double().unflatten(1, (-1, 64))
        width = steps.abs().amax(dim=-1, keepdim=True) / 7
        layer.weight.copy_(((steps / width).round().clamp(-8, 7) * width).flatten(1))
        after = model(held).logits.log_softmax(-1)
    lost = float((before.exp() * (before - after)).sum(-1).mean())
    assert lost > 1e-3
    assert found[one.removesuffix(".weight")] == pytest.approx(lost, rel=0.2)


@pytest.mark.parametrize("bits", [5.0, 8.0, 12.0])
def test_a_checkpoint_keeps_to_its_budget_and_loads_everywhere(bits: float, tmp_path: Path) -> None:
    model = save_random(tmp_path / "model", "qwen2", num_hidden_layers=3)
    result = qtoolkit.quantize(model, "w4a8", tmp_path / "out", changes={**QUICK, "budget.bits": f"{bits}bpw"})
    manifest = checkpoint.verify(tmp_path / "out")
    record = manifest.budget
    assert record is not None
    kinds = {name: row.kind for row in record.rows for name in row.layers}
    assert {name for name, kind in kinds.items() if kind == "float"} == {row["name"] for row in result.unquantized}
    assert {layer.name: layer.scheme for layer in manifest.layers}.items() <= kinds.items()
    assert len(set(kinds.values())) > 1

    stored = load_file(tmp_path / "out" / "model.safetensors")
    size = sum(
        8 * stored[f"{name}.{part}"].nbytes
        for name in kinds
        for part in ("weight_packed", "weight", "weight_scale")
        if f"{name}.{part}" in stored
    )
    weights = 3 * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 256)
    assert size / weights == pytest.approx(record.used, abs=1e-9)
    assert bits - 1.5 < record.used <= bits

    own, stock = qtoolkit.load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    counts = [sum(isinstance(m, kind) for m in own.modules()) for kind in (W4A8Linear, W8A8Linear)]
    assert counts == [list(kinds.values()).count(kind) for kind in ("W4A8-g64", "W8A8-channel")]
    tokens = torch.randint(2, 258, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        served, theirs = own(tokens).logits, stock(tokens).logits
        floating = AutoModelForCausalLM.from_pretrained(model)(tokens).logits
    scale = float(floating.float().std())
    assert float((theirs - served).abs().float().mean()) < 0.05 * scale  # one rounds in bf16 where the other does not
    assert float((served - floating).abs().float().mean()) < 0.5 * scale


def test_a_budget_beside_the_chained_grid_is_refused(tmp_path: Path) -> None:
    changes = {**QUICK, "scheme.group_size": "channel", "gptq.chained": True, "budget.bits": 5.0}
    with pytest.raises(RequestError, match=r"gptq\.chained has chosen one"):
        qtoolkit.quantize(save_random(tmp_path / "model"), "w4a8", tmp_path / "out", changes=changes)


def test_layers_that_engines_fuse_become_the_same_thing(tmp_path: Path) -> None:
    model = save_random(tmp_path / "model", num_hidden_layers=3)
    qtoolkit.quantize(model, "w4a8", tmp_path / "out", changes={**QUICK, "budget.bits": 6.5})
    record = checkpoint.verify(tmp_path / "out").budget
    assert record is not None
    kinds = {name: row.kind for row in record.rows for name in row.layers}
    for layer in range(3):
        for fused in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({kinds[f"model.layers.{layer}.{name}"] for name in fused}) == 1


def test_the_config_names_the_int8_layers_and_nothing_of_our_own(tmp_path: Path) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    model = save_random(tmp_path / "model", num_hidden_layers=3)
    qtoolkit.quantize(model, "w4a8", tmp_path / "out", changes={**QUICK, "budget.bits": 6.5})
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = QuantizationConfig.model_validate(config).config_groups
    assert config["format"] == "mixed-precision"
    (named,) = [group for group in groups.values() if group.weights.num_bits == 8]
    record = checkpoint.verify(tmp_path / "out").budget
    assert record is not None
    assert set(named.targets) == {name for row in record.rows for name in row.layers if row.kind == "W8A8-channel"}


def test_a_budget_that_shapes_rule_out_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    model = save_random(tmp_path / "model", "qwen3_moe")
    for bits, said in ((4.2, r"W4A8-g64 alone takes 4\.250"), (16, "every layer in float")):
        if bits == 16:
            model = save_random(tmp_path / "dense")
        with pytest.raises(RequestError, match=said):
            qtoolkit.quantize(model, "w4a8", tmp_path / "out", changes={**QUICK, "budget.bits": bits})
        assert not (tmp_path / "out.partial").exists()


def test_a_budget_that_leaves_nothing_quantized_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_random(tmp_path / "model")
    monkeypatch.setattr(budget, "check", lambda *given: None)  # what shapes do not tell
    with pytest.raises(RequestError, match="every layer in float"):
        qtoolkit.quantize(model, "w4a8", tmp_path / "out", changes={**QUICK, "budget.bits": 17})
    assert not (tmp_path / "out").exists()
