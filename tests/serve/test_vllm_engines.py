"""The ways a checkpoint can run in vLLM, each in an engine of its own: half a minute or more apiece."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from serving_support import Served, Start, own_greedy, own_logprobs, rewrite
from torch import Tensor, nn

from qtoolkit import registry, runtime
from qtoolkit.checkpoint import quantization_config
from qtoolkit.packing.int4 import pack_int4
from qtoolkit.runtime import W4A8Linear
from qtoolkit.scheme import Scheme
from qtoolkit.source import resolve

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

FLOAT32 = ("--dtype", "float32")
EAGER = ("--", "--enforce-eager", *FLOAT32)
LINEARS = 8  # of the two blocks, as vLLM fuses them: qkv, o, gate and up, down


def ours(served: Served) -> int:
    """Return how many layers run on our kernel."""
    return sum(count for name, count in served.ready["kernels"].items() if name.startswith("w4a8-"))


def assert_close(served: Tensor, expected: Tensor, other: Tensor) -> None:
    """Demand that the server agrees with ``expected`` far better than ``other`` does.

    Both sides compute in float32; what is left are activations that round to the other int8 neighbour.
    """
    difference, scale = (served - expected).abs().mean(), (other - expected).abs().mean()
    assert difference < 0.2 * scale, f"mean difference {difference:.2e}, where {scale:.2e} would be something else"


def reference_logprobs(folder: Path, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Return log-probabilities with int8 and with float activations."""
    models = (runtime.load(folder, dtype=torch.float32, activations=activations) for activations in (True, False))
    w4a8, w4a16 = (own_logprobs(model, tokens) for model in models)
    return w4a8, w4a16


def test_compiled_equals_our_own_runtime(start: Start, packed: Path, tokens: list[int]) -> None:
    with start(packed, ["--", *FLOAT32]) as served:
        assert ours(served) == LINEARS
        assert_close(served.prompt_logprobs(tokens), *reference_logprobs(packed, tokens))


def test_per_channel_scales_equal_our_own_runtime(start: Start, packed_channel: Path, tokens: list[int]) -> None:
    with start(packed_channel, EAGER) as served:
        assert ours(served) == LINEARS
        assert_close(served.prompt_logprobs(tokens), *reference_logprobs(packed_channel, tokens))


def test_without_the_plugin_it_is_the_float_simulation_of_the_weights(
    start: Start, packed: Path, tokens: list[int]
) -> None:
    with start(packed, EAGER, {"VLLM_PLUGINS": ""}) as served:
        assert served.ready["kernels"] == {}
        w4a8, w4a16 = reference_logprobs(packed, tokens)
        assert_close(served.prompt_logprobs(tokens), w4a16, w4a8)
        floating = runtime.load(packed, dtype=torch.float32, activations=False)
        assert served.greedy(tokens, 32) == own_greedy(floating, tokens, 32)


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


def test_two_ranks_equal_two_halves(start: Start, packed: Path, tokens: list[int]) -> None:
    halves: nn.Module = runtime.load(packed, dtype=torch.float32)
    stored = resolve(packed)
    for name, module in list(halves.named_modules()):
        if isinstance(module, W4A8Linear) and name.endswith(("o_proj", "down_proj")):
            layer = {key: stored.read(f"{name}.{key}") for key in ("weight_packed", "weight_scale", "weight_shape")}
            halves.set_submodule(name, Split(layer, Scheme()))
    with start(packed, [*EAGER, "--tensor-parallel-size", "2"]) as served:
        assert ours(served) == LINEARS
        whole, _ = reference_logprobs(packed, tokens)
        assert_close(served.prompt_logprobs(tokens), own_logprobs(halves, tokens), whole)


def as_gptq(layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a layer in the layout of GPTQ files."""
    groups, outputs = layer["weight_scale"].shape[1], layer["weight_scale"].shape[0]
    return {
        "qweight": layer["weight_packed"].t(),
        "scales": layer["weight_scale"].t(),
        "qzeros": torch.full((groups, outputs // 8), 0x77777777, dtype=torch.int32),
    }


def test_a_gptq_checkpoint_runs_w4a8_on_request_only(
    start: Start, packed: Path, tokens: list[int], tmp_path: Path
) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    gptq = rewrite(packed, tmp_path / "gptq", config, as_gptq)
    bfloat16 = ["--", "--enforce-eager", "--dtype", "bfloat16"]  # vLLM's GPTQ knows no float32
    with start(gptq, bfloat16) as served:
        assert ours(served) == 0
        assert "the checkpoint declares no int8 activations" in served.start_up_line()
    with start(gptq, bfloat16, {"QTOOLKIT_W4A8": "always"}) as served:
        assert ours(served) == LINEARS
        ask = served.prompt_logprobs(tokens)
    with start(packed, bfloat16) as served:
        assert torch.equal(ask, served.prompt_logprobs(tokens))  # the same codes, scales and operator


@pytest.mark.parametrize("bits", ["wbits", "bits"])
def test_a_qqq_checkpoint_equals_our_own_runtime(
    start: Start, packed: Path, packed_channel: Path, tokens: list[int], tmp_path: Path, bits: str
) -> None:
    folder, group_size = (packed, 128) if bits == "wbits" else (packed_channel, -1)
    int4, qqq = registry.packers.get("int4"), registry.packers.get("qqq")
    config = {"quant_method": "qqq", bits: 4, "group_size": group_size}
    old = rewrite(folder, tmp_path / "qqq", config, lambda layer: qqq.pack(int4.unpack(layer)))
    with start(old, [*EAGER, "--tensor-parallel-size", "1"]) as served:
        assert ours(served) == LINEARS
        assert_close(served.prompt_logprobs(tokens), *reference_logprobs(folder, tokens))


def test_a_qqq_checkpoint_splits_over_two_ranks(start: Start, packed: Path, tokens: list[int], tmp_path: Path) -> None:
    int4, qqq = registry.packers.get("int4"), registry.packers.get("qqq")
    config = {"quant_method": "qqq", "wbits": 4, "group_size": 128}
    old = rewrite(packed, tmp_path / "qqq", config, lambda layer: qqq.pack(int4.unpack(layer)))
    two = [*EAGER, "--tensor-parallel-size", "2"]
    with start(old, two) as served:
        assert ours(served) == LINEARS
        split = served.prompt_logprobs(tokens)
    with start(packed, two) as served:
        torch.testing.assert_close(split, served.prompt_logprobs(tokens), rtol=0, atol=1e-4)


def test_only_the_groups_that_declare_int8_run_w4a8(
    start: Start, packed: Path, tokens: list[int], tmp_path: Path
) -> None:
    config = quantization_config(Scheme(), ["lm_head"])
    declared = config["config_groups"]["group_0"]
    config["config_groups"] = {
        "group_0": {**declared, "targets": ["re:.*(q|k|v|gate|up)_proj"]},
        "group_1": {**declared, "targets": ["re:.*(o|down)_proj"], "input_activations": None},
    }
    mixed = rewrite(packed, tmp_path / "mixed", config, lambda layer: dict(layer))
    partly: Any = runtime.load(packed, dtype=torch.float32)
    floating = runtime.load(packed, dtype=torch.float32, activations=False)
    for name, _ in list(partly.named_modules()):
        if name.endswith(("o_proj", "down_proj")):
            partly.set_submodule(name, floating.get_submodule(name))
    with start(mixed, EAGER) as served:
        assert ours(served) == LINEARS // 2
        assert served.ready["kernels"]["vllm-CPUWNA16LinearKernel"] == LINEARS // 2
        whole, _ = reference_logprobs(packed, tokens)
        assert_close(served.prompt_logprobs(tokens), own_logprobs(partly, tokens), whole)


def test_a_killed_launcher_leaves_no_process(start: Start, packed: Path) -> None:
    with start(packed, EAGER) as served:
        family = served.family()
        assert len(family) >= 4  # launcher, server, engine, worker
        served.process.kill()
        served.process.wait()
        _, alive = psutil.wait_procs(family, timeout=15)
        assert not alive
