"""The ways a checkpoint can run in vLLM, each in an engine of its own: seconds to minutes apiece."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from foreign_support import change_config
from serving_support import Start, own_greedy, own_logprobs, rewrite
from tests_support import save_random
from torch import Tensor, nn

import qtoolkit
from qtoolkit import checkpoint, registry, runtime
from qtoolkit.bridges import compressed
from qtoolkit.packing.int4 import pack_int4
from qtoolkit.runtime import W4A8Linear
from qtoolkit.scheme import Scheme
from qtoolkit.serve import report
from qtoolkit.source import resolve

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

PROBE = Path(__file__).with_name("engine_probe.py")
LINEARS = 8  # of the two blocks, as vLLM fuses them: qkv, o, gate and up, down
IN_PROCESS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Ran:
    """What an engine answered: log-probabilities [prompt tokens - 1] and continuation per prompt; and how."""

    logprobs: list[Tensor]
    texts: list[list[int]]
    layers: list[report.Layer]
    recorded: int  # numbers of tokens whose calls are repeated

    @property
    def ours(self) -> int:
        """Return how many layers run on our kernel."""
        return sum(layer.kernel.startswith("w4a8-") for layer in self.layers)


def run(
    model: Path,
    prompts: list[list[int]],
    reports: Path,
    length: int | list[int] = 1,
    eager: bool = True,
    dtype: str = "float32",
    **environment: str,
) -> Ran:
    """Run ``prompts`` through vLLM in a process of its own."""
    reports.mkdir(parents=True)
    order = {
        "model": str(model),
        "prompts": prompts,
        "length": length,
        "options": {"enforce_eager": eager, "dtype": dtype},
    }
    done = subprocess.run(
        [sys.executable, str(PROBE)],
        input=json.dumps(order),
        env={**os.environ, **IN_PROCESS, report.FOLDER: str(reports), **environment},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    answer = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"logprobs"'))
    logprobs = [torch.tensor(row) for row in answer["logprobs"]]
    return Ran(logprobs, answer["texts"], report.read(reports), answer["recorded"])


def assert_close(served: Tensor, expected: Tensor, other: Tensor) -> None:
    """Demand that the server agrees with ``expected`` far better than ``other`` does."""
    difference, scale = (served - expected).abs().mean(), (other - expected).abs().mean()
    assert difference < 0.2 * scale, f"mean difference {difference:.2e}, where {scale:.2e} would be something else"


def both(folder: Path, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Return log-probabilities with int8 and with float activations, in float32."""
    models = (runtime.load(folder, dtype=torch.float32, activations=activations) for activations in (True, False))
    w4a8, w4a16 = (own_logprobs(model, tokens) for model in models)
    return w4a8, w4a16


def test_compiled_equals_our_own_runtime(packed: Path, tokens: list[int], tmp_path: Path) -> None:
    prompts = [tokens[start : start + 8] for start in range(0, 160, 8)]
    compiled = run(packed, prompts, tmp_path / "report", eager=False)
    assert compiled.ours == LINEARS
    w4a8, w4a16 = (torch.cat(rows) for rows in zip(*(both(packed, ids) for ids in prompts), strict=True))
    # Compiled float code differs in the last bit, which now and then moves an activation to the other int8
    # neighbour; that token and those after it then differ like int8 noise does. Hence short prompts, and the median.
    difference, noise = (torch.cat(compiled.logprobs) - w4a8).abs().median(), (w4a16 - w4a8).abs().median()
    assert difference < 0.01 * noise


@pytest.mark.parametrize("fixture", ["packed", "packed_channel"])
def test_eager_equals_our_own_runtime(
    request: pytest.FixtureRequest, fixture: str, tokens: list[int], tmp_path: Path
) -> None:
    folder = request.getfixturevalue(fixture)
    eager = run(folder, [tokens], tmp_path / "report")
    assert eager.ours == LINEARS
    assert_close(eager.logprobs[0], *both(folder, tokens))


def test_without_the_plugin_it_is_the_float_simulation_of_the_weights(
    packed: Path, tokens: list[int], tmp_path: Path
) -> None:
    stock = run(packed, [tokens], tmp_path / "report", length=32, dtype="float16", VLLM_PLUGINS="")
    assert stock.layers == []
    w4a8, w4a16 = both(packed, tokens)
    assert_close(stock.logprobs[0], w4a16, w4a8)
    floating = runtime.load(packed, dtype=torch.float32, activations=False)
    assert stock.texts[0] == own_greedy(floating, tokens, 32)


@pytest.mark.parametrize(
    ("model_type", "group_size", "eager"),
    [("qwen3_moe", 128, True), ("qwen2_moe", 128, False), ("mixtral", "channel", True)],
)
def test_a_mixture_of_experts_equals_our_own_runtime(
    model_type: str, group_size: int | str, eager: bool, tokens: list[int], tmp_path: Path
) -> None:
    inner = "intermediate_size" if model_type == "mixtral" else "moe_intermediate_size"
    sizes = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, inner: 128}
    sizes |= {"max_position_embeddings": 512}
    folder = save_random(tmp_path / "float", model_type, **sizes, initializer_range=0.1)
    changes = {"calibration.samples": 1, "calibration.length": 16, "scheme.group_size": group_size}
    qtoolkit.quantize(folder, "rtn", tmp_path / "packed", changes=changes)
    prompts = [tokens[start : start + 8] for start in range(0, 160, 8)]  # see the test of compiled code
    ran = run(tmp_path / "packed", prompts, tmp_path / "report", eager=eager)
    experts = [layer for layer in ran.layers if layer.name.endswith(".experts")]
    assert len(experts) == (1 if model_type == "qwen2_moe" else 2)  # block 1 of that one is dense
    assert all(layer.kernel == ran.layers[0].kernel for layer in experts)
    w4a8, w4a16 = (torch.cat(rows) for rows in zip(*(both(tmp_path / "packed", ids) for ids in prompts), strict=True))
    difference, noise = (torch.cat(ran.logprobs) - w4a8).abs().median(), (w4a16 - w4a8).abs().median()
    assert difference < 0.01 * noise


def test_a_gptq_checkpoint_runs_w4a8_on_request_only(packed: Path, tokens: list[int], tmp_path: Path) -> None:
    qtoolkit.convert(packed, tmp_path / "gptq", "gptq")
    stock = run(tmp_path / "gptq", [tokens], tmp_path / "stock", dtype="float16")  # vLLM's GPTQ knows no float32
    assert stock.ours == 0
    assert {layer.reason for layer in stock.layers if layer.name.endswith("o_proj")} == {
        "the checkpoint declares no int8 activations (QTOOLKIT_W4A8=always runs it W4A8 all the same)"
    }
    asked = run(tmp_path / "gptq", [tokens], tmp_path / "asked", dtype="float16", QTOOLKIT_W4A8="always")
    assert asked.ours == LINEARS
    declared = run(packed, [tokens], tmp_path / "declared", dtype="float16")
    assert torch.equal(asked.logprobs[0], declared.logprobs[0])  # the same codes, scales and operator


@pytest.mark.parametrize("fixture", ["packed", "packed_channel"])
def test_stock_vllm_runs_what_was_converted_to_gptq_as_it_runs_what_it_was(
    request: pytest.FixtureRequest, fixture: str, tokens: list[int], tmp_path: Path
) -> None:
    folder = request.getfixturevalue(fixture)
    qtoolkit.convert(folder, tmp_path / "gptq", "gptq")
    before, after = (
        run(model, [tokens], tmp_path / f"{model.name}-report", length=16, dtype="float16", VLLM_PLUGINS="")
        for model in (folder, tmp_path / "gptq")
    )
    assert after.layers == []  # no plugin
    assert torch.equal(after.logprobs[0], before.logprobs[0])
    assert after.texts == before.texts


def test_a_byte_a_code_runs_as_four_bits_do(packed: Path, tokens: list[int], tmp_path: Path) -> None:
    qtoolkit.convert(packed, tmp_path / "int8", "int8")
    int4, int8 = (run(model, [tokens], tmp_path / f"{model.name}-report") for model in (packed, tmp_path / "int8"))
    assert int8.ours == LINEARS
    assert torch.equal(int8.logprobs[0], int4.logprobs[0])


@pytest.mark.parametrize("fixture", ["packed", "packed_channel"])
@pytest.mark.parametrize("key", ["wbits", "bits"])
def test_a_qqq_checkpoint_equals_our_own_runtime(
    request: pytest.FixtureRequest, fixture: str, key: str, tokens: list[int], tmp_path: Path
) -> None:
    folder = request.getfixturevalue(fixture)
    qtoolkit.convert(folder, tmp_path / "qqq", "qqq")
    group_size = 128 if fixture == "packed" else -1
    change_config(tmp_path / "qqq", quantization_config={"quant_method": "qqq", key: 4, "group_size": group_size})
    old = run(tmp_path / "qqq", [tokens], tmp_path / "report")
    assert old.ours == LINEARS
    assert_close(old.logprobs[0], *both(folder, tokens))


def test_serve_starts_on_what_was_converted(start: Start, packed: Path, tokens: list[int], tmp_path: Path) -> None:
    qtoolkit.convert(packed, tmp_path / "gptq", "gptq")
    eager = ("--", "--enforce-eager", "--dtype", "bfloat16")
    with start(tmp_path / "gptq", eager, {"QTOOLKIT_W4A8": "always"}) as served:
        assert sum(n for name, n in served.ready["kernels"].items() if name.startswith("w4a8-")) == LINEARS
        assert served.prompt_logprobs(tokens).isfinite().all()


def test_only_the_groups_that_declare_int8_run_w4a8(packed: Path, tokens: list[int], tmp_path: Path) -> None:
    config = compressed.config(Scheme(), ["lm_head"])
    declared = config["config_groups"]["group_0"]
    config["config_groups"] = {
        "group_0": {**declared, "targets": ["re:.*(q|k|v|gate|up)_proj"]},
        "group_1": {**declared, "targets": ["re:.*(o|down)_proj"], "input_activations": None},
    }
    mixed = rewrite(packed, tmp_path / "mixed", config, lambda layer: dict(layer))
    partly: Any = runtime.load(packed, dtype=torch.float16)  # vLLM's own kernel knows no float32
    floating = runtime.load(packed, dtype=torch.float16, activations=False)
    for name, _ in list(partly.named_modules()):
        if name.endswith(("o_proj", "down_proj")):
            partly.set_submodule(name, floating.get_submodule(name))
    ran = run(mixed, [tokens], tmp_path / "report", dtype="float16")
    assert report.kernels(ran.layers)["vllm-CPUWNA16LinearKernel"] == ran.ours == LINEARS // 2
    for whole in both(packed, tokens):
        difference = (ran.logprobs[0] - own_logprobs(partly, tokens)).abs().mean()
        assert difference < 0.6 * (ran.logprobs[0] - whole).abs().mean()  # float16 moves some activations, too


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_an_integer_output_layer_equals_our_own_runtime(
    packed: Path, tokens: list[int], tmp_path: Path, kind: str
) -> None:
    served = run(packed, [tokens], tmp_path / "report", QTOOLKIT_LM_HEAD=kind)
    assert {layer.kernel for layer in served.layers if layer.name == "lm_head"} == {
        {"int8": "w8a8-cpu", "int4": "w4a8-cpu"}[kind]
    }
    asked: nn.Module = runtime.load(packed, dtype=torch.float32, lm_head=kind)
    plain: nn.Module = runtime.load(packed, dtype=torch.float32)
    assert_close(served.logprobs[0], own_logprobs(asked, tokens), own_logprobs(plain, tokens))


@pytest.mark.skipif(
    torch.cpu._is_amx_tile_supported(), reason="with AMX vLLM's attention stays where two heads share keys"
)
def test_our_attention_of_prompts_answers_as_vllms_does(packed: Path, tokens: list[int], tmp_path: Path) -> None:
    """Prompts of several lengths in one batch; only two heads share keys, so later tokens are vLLM's own."""
    prompts = [tokens[: 7 * n] for n in range(1, 12)]
    runs = {"own": "bfloat16", "vllm": "bfloat16", "": "float32"}
    ours, vllms, exact = (
        run(packed, prompts, tmp_path / dtype / name, length=8, dtype=dtype, QTOOLKIT_ATTENTION=name)
        for name, dtype in runs.items()
    )
    own, other, floating = (torch.cat(ran.logprobs) for ran in (ours, vllms, exact))
    assert not torch.equal(own, other)  # another kernel ran
    # rounding everything to bfloat16 moves answers; by whose attention they come must not move them further
    assert (own - floating).abs().mean() < 1.2 * (other - floating).abs().mean()
    same = [a == b for one, two in zip(ours.texts, vllms.texts, strict=True) for a, b in zip(one, two, strict=True)]
    assert sum(same) > 0.8 * len(same)


def test_repeated_steps_answer_as_torchs_python_does(tokens: list[int], tmp_path: Path) -> None:
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512}
    folder = save_random(tmp_path / "float", **sizes, hidden_size=256, initializer_range=0.1)
    changes = {"calibration.samples": 1, "calibration.length": 16}
    qtoolkit.quantize(folder, "rtn", tmp_path / "packed", changes=changes)
    prompts = [tokens[:n] for n in (5, 9, 40)]
    repeated, plain = (
        run(
            tmp_path / "packed", prompts, tmp_path / way, [24, 16, 8], eager=False, dtype="bfloat16", QTOOLKIT_STEPS=way
        )
        for way in ("repeated", "vllm")
    )
    assert plain.recorded == 0
    assert repeated.recorded == 3  # of three, two and one token a step
    assert repeated.texts == plain.texts


@pytest.mark.parametrize("tied", [False, True])
def test_our_product_of_a_bfloat16_output_layer_answers_as_vllms_does(
    tied: bool, float_model: Path, tokens: list[int], tmp_path: Path
) -> None:
    folder = tmp_path / "packed"
    if tied:
        float_model = save_random(
            tmp_path / "tied", tie_word_embeddings=True, initializer_range=0.1, max_position_embeddings=512
        )
    qtoolkit.quantize(float_model, "rtn", folder, changes={"calibration.samples": 1, "calibration.length": 16})
    ours, vllms, exact = (
        run(folder, [tokens[:n] for n in (5, 90)], tmp_path / name, length=8, dtype=dtype, QTOOLKIT_LM_HEAD=word)
        for name, dtype, word in (
            ("own", "bfloat16", "float"),
            ("vllm", "bfloat16", "vllm"),
            ("f32", "float32", "float"),
        )
    )
    heads = [next(layer.kernel for layer in ran.layers if layer.name == "lm_head") for ran in (ours, vllms, exact)]
    assert heads == ["bf16-cpu", "unquantized", "unquantized"]
    own, other, floating = (torch.cat(ran.logprobs) for ran in (ours, vllms, exact))
    # both round logits to bfloat16 once, after sums in float32
    assert (own - floating).abs().mean() < 1.2 * (other - floating).abs().mean()
    assert (own - other).abs().mean() < 0.2 * (other - floating).abs().mean()


class Split(nn.Module):
    """A row-parallel layer on two ranks: each quantizes its half of the inputs, the results are added."""

    def __init__(self, packed: Mapping[str, Tensor], scheme: Scheme) -> None:
        super().__init__()
        weight = registry.packers.get("int4").unpack(packed)
        codes, scales = weight.codes.chunk(2, dim=1), weight.scales.chunk(2, dim=1)
        self.halves = nn.ModuleList(
            W4A8Linear(pack_int4(c), s, None, c.shape[1], scheme, torch.float32)
            for c, s in zip(codes, scales, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        return sum(half(part) for half, part in zip(self.halves, x.chunk(2, dim=-1), strict=True))


def in_halves(packed: Path, lm_head: str = "float") -> nn.Module:
    """Return our runtime's model with every row-parallel layer as two ranks compute it."""
    halves: nn.Module = runtime.load(packed, dtype=torch.float32, lm_head=lm_head)
    stored = resolve(packed)
    for name, module in list(halves.named_modules()):
        if isinstance(module, W4A8Linear) and name.endswith(("o_proj", "down_proj")):
            layer = {key: stored.read(f"{name}.{key}") for key in ("weight_packed", "weight_scale", "weight_shape")}
            halves.set_submodule(name, Split(layer, Scheme()))
    return halves


TWO_RANKS = ("--", "--enforce-eager", "--dtype", "float32", "--tensor-parallel-size", "2")


def test_two_ranks_equal_two_halves_also_from_a_qqq_file(
    start: Start, packed: Path, tokens: list[int], tmp_path: Path
) -> None:
    expected, (whole, _) = own_logprobs(in_halves(packed), tokens), both(packed, tokens)
    qtoolkit.convert(packed, tmp_path / "qqq", "qqq")
    for folder in (packed, tmp_path / "qqq"):
        with start(folder, TWO_RANKS) as served:
            assert sum(n for name, n in served.ready["kernels"].items() if name.startswith("w4a8-")) == LINEARS
            assert_close(served.prompt_logprobs(tokens), expected, whole)


def test_two_ranks_round_an_output_layer_as_one_does(start: Start, packed: Path, tokens: list[int]) -> None:
    """Each rank has half of the vocabulary, and a token's row has a scale of its own."""
    expected, plain = (own_logprobs(in_halves(packed, kind), tokens) for kind in ("int8", "float"))
    with start(packed, TWO_RANKS, {"QTOOLKIT_LM_HEAD": "int8"}) as served:
        assert served.ready["kernels"]["w8a8-cpu"] >= 1
        assert_close(served.prompt_logprobs(tokens), expected, plain)


@pytest.mark.parametrize("plugins", ["", "qtoolkit"])
def test_int8_and_float_layers_beside_int4_run_with_and_without_the_plugin(
    plugins: str, float_model: Path, tokens: list[int], tmp_path: Path
) -> None:
    """A size budget makes such checkpoints: vLLM's own W8A8 runs what is int8."""
    if not plugins and torch.cpu._is_amx_tile_supported():
        pytest.skip("stock vLLM's int8 operator for AMX ends the process in float16")
    folder = tmp_path / "mixed"
    changes = {"calibration.samples": 2, "calibration.length": 32, "budget.bits": 7.0}
    qtoolkit.quantize(float_model, "rtn", folder, changes=changes)
    kinds = {row.kind for row in checkpoint.verify(folder).budget.rows}
    assert "W8A8-channel" in kinds
    dtype, environment = ("float32", {}) if plugins else ("float16", {"VLLM_PLUGINS": ""})  # stock int4 is 16 bits only
    ran = run(folder, [tokens], tmp_path / "report", dtype=dtype, **environment)
    served, simulated = both(folder, tokens)
    assert (ran.ours > 0) == bool(plugins)
    floating = own_logprobs(runtime.load(float_model, dtype=torch.float32), tokens)
    expected = served if plugins else simulated  # there int4 layers have float inputs, int8 layers int8 ones
    # oneDNN's int8 product sums in another order; a last bit now and then moves an activation to its int8 neighbour
    assert (ran.logprobs[0] - expected).abs().mean() < 0.5 * (floating - expected).abs().mean()


def test_a_killed_launcher_leaves_no_process(start: Start, packed: Path) -> None:
    with start(packed, ["--", "--enforce-eager"]) as served:
        family = served.family()
        assert len(family) >= 4  # launcher, server, engine, worker
        served.process.kill()
        served.process.wait()
        _, alive = psutil.wait_procs(family, timeout=15)
        assert not alive
