"""Rotation: the float model's function stays, on every supported architecture; what is read is the formula's weight."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests_support import MIXTURES, save_random
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import qtoolkit
from qtoolkit import architecture, checkpoint
from qtoolkit.calibration import capture, trial
from qtoolkit.calibration.rotation import Rotate, Rotated, RotateOptions, Rotation
from qtoolkit.source import resolve

DENSE = ("llama", "mistral", "qwen2", "qwen3")
KINDS = [*((kind, tied) for kind in DENSE for tied in (False, True)), *((kind, True) for kind in MIXTURES)]
QUICK = {
    "calibration.samples": 4,
    "calibration.length": 32,
    "scheme.group_size": 64,
    "outliers.method": "rotate",
}


def exact(folder: Path) -> Path:
    """Store a saved model's weights in float32 with gains unlike one, so that nothing is lost by rounding."""
    file = folder / "model.safetensors"
    draw = torch.Generator().manual_seed(5)
    state = {name: tensor.float() for name, tensor in load_file(file).items()}
    for name, tensor in state.items():
        if "norm" in name:
            state[name] = 0.5 + torch.rand(tensor.shape, generator=draw)
    save_file(state, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return folder


def rotated(folder: Path, seed: int = 3, heads: bool = True) -> Rotated:
    source = resolve(folder)
    return Rotate(RotateOptions(heads=heads)).rewrite(source, architecture.skeleton(source), seed)


def logits(folder: Path, state: dict[str, Tensor] | None, config: dict[str, Any] | None = None) -> Tensor:
    """Return the logits of a folder's model in float64, with other weights if given."""
    where = folder
    if state is not None:
        where = folder / "turned"
        where.mkdir()
        (where / "config.json").write_text(json.dumps(config))
        save_file(state, where / "model.safetensors", metadata={"format": "pt"})
    options = {"dtype": torch.float64, "experts_implementation": "eager"}  # fused experts have no float64 product
    model, said = AutoModelForCausalLM.from_pretrained(where, output_loading_info=True, **options)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    tokens = torch.randint(2, 258, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model.eval()(tokens).logits


@pytest.mark.parametrize(("model_type", "tied"), KINDS)
@pytest.mark.parametrize(("hidden", "head_dim"), [(128, 32), (120, 48), (92, 46)])
def test_the_rotated_model_gives_the_same_logits(
    model_type: str, tied: bool, hidden: int, head_dim: int, tmp_path: Path
) -> None:
    """120 and 48 are Paley sizes, 92 and 46 have no construction; none of the latter heads is hidden / 4 wide."""
    values = {"hidden_size": hidden, "head_dim": head_dim, "tie_word_embeddings": tied}
    folder = exact(save_random(tmp_path / "model", model_type, **values))
    view = rotated(folder)
    state = {name: view.read(name) for name in view.files}
    assert view.config["tie_word_embeddings"] is False
    assert not torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    before, after = logits(folder, None), logits(folder, state, view.config)
    # the rotated weights are rounded to float32 once: 2^-24 of each, over sums of about 100 terms and two blocks
    assert float((after - before).abs().max()) < 3e-6 * float(before.abs().max())


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_each_tensor_is_the_formula_s(model_type: str, tmp_path: Path) -> None:
    folder = exact(save_random(tmp_path / "model", model_type))
    view, plain = rotated(folder), resolve(folder)
    q = view.hidden.turn(torch.eye(128, dtype=torch.float64))
    qh = Rotation(32, 4).turn(torch.eye(32, dtype=torch.float64))  # one a head, the same for all
    assert torch.allclose(q @ q.T, torch.eye(128, dtype=torch.float64), atol=1e-12)

    def old(name: str) -> Tensor:
        return plain.read(name).double()

    block = "model.layers.1."
    gain = old(f"{block}input_layernorm.weight")
    values, outputs = torch.kron(torch.eye(2).double(), qh), torch.kron(torch.eye(4).double(), qh)
    expected = {
        "model.embed_tokens.weight": old("model.embed_tokens.weight") @ q,
        "lm_head.weight": old("lm_head.weight") @ torch.diag(old("model.norm.weight")) @ q,
        "model.norm.weight": torch.ones(128),
        f"{block}input_layernorm.weight": torch.ones(128),
        f"{block}self_attn.q_proj.weight": old(f"{block}self_attn.q_proj.weight") @ torch.diag(gain) @ q,
        f"{block}self_attn.v_proj.weight": values.T @ old(f"{block}self_attn.v_proj.weight") @ torch.diag(gain) @ q,
        f"{block}self_attn.o_proj.weight": q.T @ old(f"{block}self_attn.o_proj.weight") @ outputs,
        f"{block}mlp.down_proj.weight": q.T @ old(f"{block}mlp.down_proj.weight"),
    }
    if model_type == "qwen2":
        expected[f"{block}self_attn.v_proj.bias"] = old(f"{block}self_attn.v_proj.bias") @ values
        expected[f"{block}self_attn.q_proj.bias"] = old(f"{block}self_attn.q_proj.bias")
    for name, tensor in expected.items():
        torch.testing.assert_close(view.read(name).double(), tensor.double(), rtol=1e-6, atol=1e-7, msg=name)


def test_the_stream_of_the_rotated_model_is_the_float_stream_turned(tmp_path: Path) -> None:
    folder = exact(save_random(tmp_path / "model", "qwen3", head_dim=48))
    view = rotated(folder)
    tokens = torch.randint(2, 258, (2, 16), generator=torch.Generator().manual_seed(1))
    for source in (resolve(folder), view):
        skeleton = architecture.skeleton(resolve(folder))
        stream = capture.embed(skeleton, source, tokens)
        for index in range(2):
            stream = capture.advance(skeleton.block(index, source), stream)
        if source is view:
            turned = torch.cat(stream.batches)
        else:
            plain = torch.cat(stream.batches)
    torch.testing.assert_close(view.hidden.turn(plain), turned, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(view.hidden.back(turned), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_behind_the_last_block_the_rotated_model_reads_the_head_that_it_is_served_with(
    tied: bool, tmp_path: Path
) -> None:
    """Rotation unties: the final norm's gain is in its head, and not in its embedding."""
    folder = exact(save_random(tmp_path / "model", tie_word_embeddings=tied))
    view, source = rotated(folder), resolve(folder)
    skeleton = architecture.skeleton(source)
    assert skeleton.tied == tied
    states = torch.randn(5, 128, generator=torch.Generator().manual_seed(2))
    norm, head = trial.ending(skeleton, source)
    turned_norm, turned_head = trial.ending(skeleton, view)
    plain, turned = norm(states) @ head.T, turned_norm(view.hidden.turn(states)) @ turned_head.T.float()
    torch.testing.assert_close(turned, plain, rtol=1e-3, atol=1e-4)


def test_an_outlier_channel_is_spread_over_all(tmp_path: Path) -> None:
    x = torch.randn(50, 128, generator=torch.Generator().manual_seed(2))
    x[:, 7] *= 60
    turned = Rotation(128, 0).turn(x)
    assert float(x.abs().amax() / x.square().mean().sqrt()) > 20
    assert float(turned.abs().amax() / turned.square().mean().sqrt()) < 5


def test_tensors_are_made_where_the_weights_are(tmp_path: Path) -> None:
    """Whatever forgets its device would be made on the default one: here a device that holds no numbers."""
    folder = save_random(tmp_path / "model", "qwen2", tie_word_embeddings=True)
    view, dense = rotated(folder), Rotation(46, 0)
    x = torch.randn(3, 92, generator=torch.Generator().manual_seed(0))
    with torch.device("meta"):
        read = {name: view.read(name) for name in view.files}
        assert torch.equal(dense.back(dense.turn(x)).cpu().round(decimals=3), x.round(decimals=3))
    assert {tensor.device.type for tensor in read.values()} == {"cpu"}


def test_the_seed_decides_the_rotation(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(rotated(folder, 1).read(name), rotated(folder, 1).read(name))
    assert not torch.equal(rotated(folder, 1).read(name), rotated(folder, 2).read(name))


def test_a_rotated_checkpoint_loads_everywhere_and_stays_near_the_float_model(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", "qwen2", tie_word_embeddings=True)
    said = Said()
    qtoolkit.quantize(folder, "w4a8", tmp_path / "out", changes=QUICK, progress=said)
    assert any("untied" in line for line in said.lines)
    assert any("untied" in note for note in checkpoint.verify(tmp_path / "out").notes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    tokens = torch.randint(2, 258, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        served = qtoolkit.load(tmp_path / "out")(tokens).logits
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)(tokens).logits
        original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)(tokens).logits
    scale = float(original.float().std())
    assert float((stock - served).abs().float().mean()) < 0.05 * scale  # one rounds in bf16 where the other does not
    assert 0 < float((served - original).abs().float().mean()) < 0.5 * scale


def test_a_killed_run_with_rotation_and_budget_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", "qwen2", tie_word_embeddings=True, num_hidden_layers=3)
    changes = {**QUICK, "budget.bits": 5.5}
    qtoolkit.quantize(folder, "w4a8", tmp_path / "whole", changes=changes)
    whole = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    script = Path(__file__).parents[1] / "kill_runner.py"
    words = [sys.executable, str(script), str(folder), str(tmp_path / "out"), json.dumps(changes)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as runner:
        assert runner.stdin is not None
        assert runner.stdout is not None
        seen = set()
        for part in ("budget", "block-00000", "block-00001", "rest"):  # killed when this is written, or later
            print(f"{tmp_path / 'out.partial' / part}.safetensors", file=runner.stdin, flush=True)
            status = int(runner.stdout.readline().split()[0])
            seen.add(status)
            if status == 0:
                break
        assert -signal.SIGKILL in seen
        if not (tmp_path / "out").exists():
            print(600, file=runner.stdin, flush=True)
            assert runner.stdout.readline().split()[0] == "0"
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == whole


def test_trained_models_keep_their_logits(shared_data: Path) -> None:
    for folder in (resolve("tiny").path, shared_data / "models" / "stories260k-hf"):
        view = rotated(folder)
        tokens = torch.randint(3, 500, (1, 64), generator=torch.Generator().manual_seed(0))
        before = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        after = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder, tie_word_embeddings=False), dtype=torch.float32
        )
        after.load_state_dict({name: view.read(name).float() for name in view.files})
        with torch.inference_mode():
            p, q = (model.eval()(tokens).logits.log_softmax(-1) for model in (before, after))
        # float32, or the embedding and the head rounded to the stored bfloat16: 2^-9 of each value
        assert float((p.exp() * (p - q)).sum(-1).mean()) < 1e-4


class Said:
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def start(self, blocks: int, done: int) -> None: ...

    def say(self, text: str) -> None:
        self.lines.append(text)

    def block(self, name: str, error: float) -> None: ...
