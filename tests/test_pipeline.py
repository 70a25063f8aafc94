"""The whole run on small random models: what is written, that it loads everywhere, resumes, and repeats bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests_support import save_random
from transformers import AutoModelForCausalLM, AutoTokenizer

import qtoolkit
from qtoolkit import architecture, checkpoint, pipeline, recipe, registry
from qtoolkit.calibration.options import Options as NoOptions
from qtoolkit.errors import CheckpointError, DataError, ModelError, NumericError, QToolkitError, RequestError
from qtoolkit.job import Job
from qtoolkit.runtime import W4A8Linear
from qtoolkit.scheme import CHANNEL
from qtoolkit.source import resolve
from qtoolkit.vision.record import VisionRecipe

QUICK = {
    "calibration.samples": 4,
    "calibration.length": 32,
    "smooth.grid": 5,
    "scheme.group_size": 64,
    "outliers.method": "smooth",
}


PACKINGS: dict[str, list[str]] = {"foreign": ["foo"], "unpacked": []}


def digests(folder: Path) -> dict[str, str]:
    """Return a hash of every weight file and config of a checkpoint."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


@pytest.fixture(scope="module")
def quantized(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished checkpoint of the random model."""
    folder = tmp_path_factory.mktemp("quantized") / "out"
    qtoolkit.quantize(random_llama, "w4a8", folder, changes=QUICK)
    return folder


def test_the_result_says_what_was_done(random_llama: Path, tmp_path: Path) -> None:
    result = qtoolkit.quantize(random_llama, "w4a8", tmp_path / "out", changes=QUICK)
    assert result.ok
    assert result.scheme == "W4A8-g64"
    assert len(result.layers) == 14
    assert all(0 < layer["error"] < 0.2 for layer in result.layers)
    assert result.bytes_after < result.bytes_before
    assert result.calibration_tokens == 4 * 32
    assert not (tmp_path / "out.partial").exists()


def test_trials_read_text_alone_and_the_run_random_tokens_behind_it(
    random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[str, list[torch.Tensor]] = {"choice": [], "budget": [], "run": []}

    def watched(name: str, module: Any, function: str, place: int) -> None:
        made = getattr(module, function)

        def watch(*args: Any, **kwargs: Any) -> Any:
            read[name].append(args[place].clone())
            return made(*args, **kwargs)

        monkeypatch.setattr(module, function, watch)

    watched("choice", pipeline.choice, "choose", 4)
    watched("budget", pipeline.budget, "measure", 4)
    watched("run", pipeline.Gradients, "__init__", 4)
    changes = {**QUICK, "calibration.samples": 16, "outliers.method": "auto", "budget.bits": 5}
    result = qtoolkit.quantize(random_llama, "w4a8", tmp_path / "out", changes=changes)
    assert result.calibration_tokens == 16 * 32
    assert [each.shape for each in (*read["choice"], *read["budget"])] == [(14, 32)] * 2
    assert torch.equal(read["run"][0][:14], read["choice"][0])
    assert read["run"][0].shape == (16, 32)


def test_a_loaded_model_gives_the_same_tensors_as_its_folder(
    random_llama: Path, quantized: Path, tmp_path: Path
) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(random_llama), AutoTokenizer.from_pretrained(random_llama)
    with pytest.raises(RequestError, match="tokenizer"):
        qtoolkit.quantize(model, "w4a8", tmp_path / "out", changes=QUICK)
    qtoolkit.quantize(model, "w4a8", tmp_path / "out", changes=QUICK, tokenizer=tokenizer)
    assert digests(tmp_path / "out")["model.safetensors"] == digests(quantized)["model.safetensors"]


@pytest.mark.parametrize(("window", "length"), [(16, 16), (64, 32)])
def test_where_some_blocks_attend_to_a_window_text_is_no_longer_than_that(
    window: int, length: int, tmp_path: Path
) -> None:
    """Every block is calibrated under the mask of the first one."""
    types = ["full_attention", "sliding_attention"]
    values = {"use_sliding_window": True, "sliding_window": window, "layer_types": types}
    model = save_random(tmp_path / "model", "qwen2", **values)
    assert architecture.skeleton(resolve(model)).longest == window
    result = qtoolkit.quantize(model, "w4a8", tmp_path / "out", changes=QUICK)
    assert result.calibration_tokens == 4 * length


def test_the_config_is_standard_and_the_manifest_is_whole(quantized: Path) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    config = json.loads((quantized / "config.json").read_text())
    parsed = QuantizationConfig.model_validate(config["quantization_config"])
    (scheme,) = parsed.config_groups.values()
    assert (scheme.weights.num_bits, scheme.weights.group_size) == (4, 64)
    assert (scheme.input_activations.num_bits, scheme.input_activations.dynamic) == (8, True)
    manifest = checkpoint.verify(quantized)
    assert {layer.name for layer in manifest.layers} == {
        f"model.layers.{i}.{name}"
        for i in range(2)
        for name in (
            *(f"self_attn.{p}_proj" for p in "qkvo"),
            *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
        )
    }
    assert {group.name for group in manifest.groups} >= {"model.layers.0.qkv", "model.layers.1.o_proj"}


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("group_size", [64, CHANNEL])
def test_stock_transformers_computes_what_our_float_simulation_computes(
    model_type: str, group_size: int, tmp_path: Path
) -> None:
    tied = model_type == "qwen2"
    head_dim = 48 if model_type in ("qwen3", "mistral") else 32  # 48 is not hidden_size / heads
    model = save_random(tmp_path / "model", model_type, tie_word_embeddings=tied, head_dim=head_dim)
    qtoolkit.quantize(model, "w4a8", tmp_path / "out", changes={**QUICK, "scheme.group_size": group_size})
    tokens = torch.randint(2, 258, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        simulated = qtoolkit.load(tmp_path / "out", activations=False)(tokens).logits
        served = qtoolkit.load(tmp_path / "out")(tokens).logits
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)(tokens).logits
        original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)(tokens).logits
    assert type(stock) is torch.Tensor
    scale = float(original.float().std())
    # stock transformers rounds activations to int8 too, so it stands between the two; bf16 keeps 8 bits
    assert float((stock - served).abs().float().mean()) < 0.05 * scale
    assert float((simulated - served).abs().float().mean()) < 0.05 * scale
    assert 0 < float((served - original).abs().float().mean()) < 0.5 * scale


def test_every_quantized_layer_runs_as_w4a8(quantized: Path) -> None:
    model = qtoolkit.load(quantized)
    layers = [module for module in model.modules() if isinstance(module, W4A8Linear)]
    assert len(layers) == 14
    assert isinstance(model.lm_head, torch.nn.Linear)


def test_two_runs_write_the_same_bytes(random_llama: Path, quantized: Path, tmp_path: Path) -> None:
    qtoolkit.quantize(random_llama, "w4a8", tmp_path / "again", changes=QUICK)
    assert digests(tmp_path / "again") == digests(quantized)


def test_several_shards_hold_the_same_tensors_and_load_everywhere(
    random_llama: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qtoolkit.assembly.SHARD_BYTES", 100_000)
    qtoolkit.quantize(random_llama, "w4a8", tmp_path / "out", changes=QUICK)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) == 4  # two blocks, the embedding, and the head with the norm
    merged = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    whole = load_file(quantized / "model.safetensors")
    assert merged.keys() == whole.keys()
    assert all(torch.equal(merged[name], whole[name]) for name in whole)
    tokens = torch.randint(2, 258, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(qtoolkit.load(tmp_path / "out")(tokens).logits, qtoolkit.load(quantized)(tokens).logits)
        stock = [AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in (tmp_path / "out", quantized)]
    assert torch.equal(*stock)


def test_layers_that_no_group_fits_stay_in_float_and_are_reported(tmp_path: Path) -> None:
    model = save_random(tmp_path / "model", intermediate_size=168)  # 168 is no multiple of 64
    result = qtoolkit.quantize(model, "w4a8", tmp_path / "out", changes=QUICK)
    kept = [row["name"] for row in result.unquantized]
    assert kept == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert "168" in result.unquantized[0]["reason"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "model.layers.0.mlp.down_proj" in config["quantization_config"]["ignore"]
    assert isinstance(qtoolkit.load(tmp_path / "out").model.layers[0].mlp.down_proj, torch.nn.Linear)


def test_a_finished_folder_is_refused_and_fresh_replaces_it(
    random_llama: Path, quantized: Path, tmp_path: Path
) -> None:
    before = digests(quantized)
    with pytest.raises(RequestError, match="finished checkpoint"):
        qtoolkit.quantize(random_llama, "w4a8", quantized, changes=QUICK)
    assert digests(quantized) == before
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(RequestError, match="not a qtoolkit checkpoint"):
            qtoolkit.quantize(random_llama, "w4a8", tmp_path / "taken", changes=QUICK, fresh=fresh)
    assert (tmp_path / "taken" / "file").read_text() == "mine"


def test_an_interrupted_run_refuses_other_options(random_llama: Path, tmp_path: Path) -> None:
    class Stop:
        def start(self, blocks: int, done: int) -> None: ...
        def say(self, text: str) -> None: ...
        def block(self, name: str, error: float) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qtoolkit.quantize(random_llama, "w4a8", tmp_path / "out", changes=QUICK, progress=Stop())
    assert not (tmp_path / "out").exists()
    with pytest.raises(RequestError, match="recipe"):
        qtoolkit.quantize(random_llama, "w4a8", tmp_path / "out", changes={**QUICK, "calibration.seed": 9})


def test_killing_at_random_moments_leaves_nothing_that_looks_finished_and_resumes_to_the_same_bytes(
    random_llama: Path, quantized: Path, tmp_path: Path
) -> None:
    words = [str(random_llama), str(tmp_path / "out"), json.dumps(QUICK)]
    script = Path(__file__).with_name("kill_runner.py")
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # another number would round sums otherwise
    runner = subprocess.Popen(
        [sys.executable, str(script), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, **threads},
    )  # fmt: skip
    assert runner.stdin is not None
    assert runner.stdout is not None

    def run(kill_after: float) -> tuple[int, float]:
        """Run once, killed after so many seconds unless it ends before; return its status and duration."""
        print(kill_after, file=runner.stdin, flush=True)
        status, seconds = runner.stdout.readline().split()
        return int(status), float(seconds)

    status, duration = run(600)
    assert status == 0
    whole = digests(tmp_path / "out")
    assert whole["model.safetensors"] == digests(quantized)["model.safetensors"]
    shutil.rmtree(tmp_path / "out")
    draw = random.Random(0)
    kills = 0
    while kills < 12:
        status, _ = run(duration * draw.uniform(0.02, 1.1))
        kills += status == -signal.SIGKILL
        if (tmp_path / "out").exists():  # published: whole, whether the run was killed right after it or not
            assert digests(tmp_path / "out") == whole
            shutil.rmtree(tmp_path / "out")
            shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
        elif kills % 4 == 0:  # after every fourth kill let the run go on to its end
            assert run(600)[0] == 0
            assert digests(tmp_path / "out") == whole
            assert not (tmp_path / "out.partial").exists()
            shutil.rmtree(tmp_path / "out")
    runner.stdin.close()
    runner.wait()


def test_bad_models_are_refused_in_one_sentence(random_llama: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in random_llama.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    def refused(kind: type[Exception], words: str, model: Path | str) -> None:
        with pytest.raises(kind, match=words):
            qtoolkit.quantize(model, "w4a8", tmp_path / "out", changes=QUICK)
        assert not (tmp_path / "out").exists()

    refused(RequestError, "no such folder", str(tmp_path / "nowhere"))
    refused(RequestError, "not a hub name", "no-such-model")
    (tmp_path / "empty").mkdir()
    refused(ModelError, r"no config\.json", tmp_path / "empty")

    unsupported = copy("unsupported")
    config = json.loads((unsupported / "config.json").read_text())
    (unsupported / "config.json").write_text(json.dumps({**config, "model_type": "lama"}))
    refused(ModelError, "'lama' is not supported. Did you mean llama", unsupported)

    truncated = copy("truncated")
    weights = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(weights[:-100])
    refused(ModelError, "damaged or truncated", truncated)

    for name, text in (("config.json", "[]"), ("model.safetensors.index.json", "[]")):
        listed = copy(f"listed-{name}")
        (listed / name).write_text(text)
        refused(ModelError, name, listed)
    (listed / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    refused(ModelError, "gone.safetensors named by the index is missing", listed)

    pickled = copy("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    refused(ModelError, "pickled", pickled)

    mismatching = copy("mismatching")
    (mismatching / "config.json").write_text(json.dumps({**config, "intermediate_size": 320}))
    refused(ModelError, r"mlp.*has shape", mismatching)

    for name, bad in (("nan", torch.nan), ("inf", torch.inf)):
        damaged = copy(name)
        tensors = load_file(damaged / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = bad
        save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(NumericError, match=r"model\.layers\.1\.mlp\.up_proj"):
            qtoolkit.quantize(damaged, "w4a8", tmp_path / f"out-{name}", changes=QUICK)
        assert not (tmp_path / f"out-{name}").exists()

    loud = copy("loud")
    tensors = load_file(loud / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].fill_(1e38)  # finite weights, infinite activations
    save_file(tensors, loud / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "text.txt").write_text("Any text will do here. " * 40)
    changes = {**QUICK, "calibration.data": str(tmp_path / "text.txt")}
    with pytest.raises(NumericError, match=r"model\.layers\.1.*calibration text"):
        qtoolkit.quantize(loud, "w4a8", tmp_path / "out-loud", changes=changes)


def test_bad_calibration_data_is_refused(random_llama: Path, tmp_path: Path) -> None:
    def run(data: Path | str) -> None:
        qtoolkit.quantize(random_llama, "w4a8", tmp_path / "out", changes={**QUICK, "calibration.data": str(data)})

    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": 1}\n')
    with pytest.raises(DataError, match="holds no text"):
        run(tmp_path / "empty.txt")
    with pytest.raises(DataError, match="9 tokens"):
        run(tmp_path / "short.txt")
    with pytest.raises(DataError, match="line 2"):
        run(tmp_path / "bad.jsonl")
    for line in ("{broken", '"text"', '{"messages": ["a"]}', '{"messages": [{"content": "a"}]}'):
        (tmp_path / "bad.jsonl").write_text(line)
        with pytest.raises(DataError, match="line 1"):
            run(tmp_path / "bad.jsonl")
    with pytest.raises(RequestError, match="wikitext2"):
        run("wikitext")
    assert not (tmp_path / "out").exists()


def test_calibration_on_text_and_on_chat_transcripts(random_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("All happy families are alike. " * 40)
    row = {"messages": [{"role": "user", "content": "Hello there. " * 30}, {"role": "assistant", "content": "Yes."}]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"text": "and text"}))
    for name in ("text.txt", "chat.jsonl"):
        changes = {**QUICK, "calibration.data": str(tmp_path / name)}
        assert qtoolkit.quantize(random_llama, "w4a8", tmp_path / f"{name}-out", changes=changes).ok


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"packer": "nm"}, "The packer nm stores no layers of llm models"),
        ({"steps": {"sparsify": {}}}, "The step sparsify is for vision models"),
    ],
)
def test_what_compresses_images_alone_is_refused_before_anything_is_written(
    part: dict[str, Any], said: str, random_llama: Path, tmp_path: Path
) -> None:
    settings = recipe.validate({"name": "mixed", "steps": {"gptq": {}}, **part})
    with pytest.raises(RequestError, match=said):
        qtoolkit.quantize(random_llama, settings, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_language_models_step_is_refused_for_images() -> None:
    settings = recipe.validate(
        {"name": "mixed", "kind": "vision", "scheme": {"pattern": "2:4"}, "steps": {"gptq": {}}}, VisionRecipe
    )
    with pytest.raises(RequestError, match="The step gptq is for llm models, not for vision models"):
        pipeline.build_transforms(settings)


def test_every_step_of_the_package_says_what_it_compresses() -> None:
    assert {*registry.STEPS["llm"], *registry.STEPS["vision"]} == {*registry.transforms.names()}


def test_a_damaged_checkpoint_is_one_clear_error(quantized: Path, tmp_path: Path) -> None:
    def damaged(name: str, change: str, text: bytes) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in quantized.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / change).write_bytes(text)
        return folder

    manifest = json.loads((quantized / "qtoolkit.json").read_text())
    weights = (quantized / "model.safetensors").read_bytes()
    newer = json.dumps({**manifest, "schema_version": 99}).encode()
    odd = {**manifest, "layers": [{**manifest["layers"][0], "scheme": "W4"}]}
    strange = json.dumps({**manifest, "surprise": 1}).encode()
    for words, folder in (
        ("schema version 99", damaged("newer", "qtoolkit.json", newer)),
        ("surprise", damaged("strange", "qtoolkit.json", strange)),
        ("damaged", damaged("half", "qtoolkit.json", b'{"schema_version": 1')),
        ("bytes instead of", damaged("short", "model.safetensors", weights[:-7])),
        ("not the name of a scheme", damaged("odd", "qtoolkit.json", json.dumps(odd).encode())),
    ):
        with pytest.raises(CheckpointError, match=words):
            qtoolkit.load(folder)
    endless = json.dumps(manifest).replace('"schema_version": 1', '"schema_version": 1e400').encode()
    stepless = json.dumps({**manifest, "recipe": {"steps": None}}).encode()
    other = {name: json.dumps({**manifest, "packing": packing}).encode() for name, packing in PACKINGS.items()}
    for words, folder in (
        ("infinity", damaged("endless", "qtoolkit.json", endless)),
        ("damaged at recipe", damaged("stepless", "qtoolkit.json", stepless)),
        ("damaged at packing: 'foo' is not known", damaged("foreign", "qtoolkit.json", other["foreign"])),
        ("damaged at packing: there is none", damaged("unpacked", "qtoolkit.json", other["unpacked"])),
        ("has no model_type", damaged("empty", "config.json", b"{}")),
        ("has no quantization_config", damaged("plain", "config.json", b'{"model_type": "llama"}')),
        ("cannot be read as JSON", damaged("torn", "config.json", b"{")),
    ):
        for read in (qtoolkit.load, checkpoint.verify):
            with pytest.raises(CheckpointError, match=words):
                read(folder)
        with pytest.raises(CheckpointError, match=words):
            qtoolkit.convert(folder, tmp_path / "converted", "gptq")
        assert not (tmp_path / "converted").exists()
    (damaged("headless", "config.json", b"") / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        checkpoint.verify(tmp_path / "headless")
    with pytest.raises(RequestError, match="no such folder"):
        qtoolkit.load(tmp_path / "nowhere")


def test_a_full_disk_is_one_sentence_and_nothing_is_lost(
    random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(qtoolkit.errors.QToolkitError, match="disk is full"):
            qtoolkit.quantize(random_llama, "w4a8", tmp_path / "out", changes=QUICK)
    assert not (tmp_path / "out").exists()
    assert qtoolkit.quantize(random_llama, "w4a8", tmp_path / "out", changes=QUICK).ok


@pytest.mark.parametrize("keep", [[], ["model.layers.0.mlp.down_proj"], ["mlp.down_proj"]])
def test_the_head_stays_in_float_whatever_the_recipe_keeps(keep: list[str], random_llama: Path, tmp_path: Path) -> None:
    settings = recipe.load("rtn", {key: value for key, value in QUICK.items() if "smooth" not in f"{key} {value}"})
    qtoolkit.quantize(random_llama, settings.model_copy(update={"keep": tuple(keep)}), tmp_path / "out")
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert {"lm_head", *(name for name in keep if name.startswith("model"))} <= {*ignored}
    tokens = torch.randint(2, 258, (1, 8), generator=torch.Generator().manual_seed(0))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    with torch.inference_mode():
        assert torch.allclose(stock(tokens).logits, qtoolkit.load(tmp_path / "out")(tokens).logits, atol=0.05)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mlp.down_pro", "Did you mean mlp.down_proj"),
        ("model.layers.7.mlp.down_proj", "Did you mean mlp.down_proj"),
        ("model.layers.0.mlp", "mlp.up_proj"),
        ("lm_haed", "Did you mean lm_head"),
        ("xyz", "Known: "),
    ],
)
def test_a_layer_to_keep_that_the_model_does_not_have_is_refused(
    name: str, hint: str, random_llama: Path, tmp_path: Path
) -> None:
    settings = recipe.load("rtn").model_copy(update={"keep": ("lm_head", name)})
    with pytest.raises(RequestError, match=f"keeps '{name}', which is no layer") as caught:
        qtoolkit.quantize(random_llama, settings, tmp_path / "out")
    assert hint in caught.value.hint
    assert not list(tmp_path.iterdir())


def planned(steps: list[str], method: str | None = None) -> recipe.Recipe:
    """Return a recipe of these steps, without options."""
    return recipe.validate({"name": "x", "steps": {step: {} for step in steps}, "outliers": {"method": method}})


@pytest.mark.parametrize("steps", [[], ["smooth"], ["rotate"], ["rotate", "smooth"]])
def test_a_recipe_whose_steps_round_nothing_is_refused(steps: list[str]) -> None:
    with pytest.raises(RequestError, match="No step of the recipe x rounds the weights") as caught:
        pipeline.build_transforms(planned(steps))
    assert "gptq" in caught.value.hint


def test_a_step_behind_the_one_that_rounds_is_refused() -> None:
    with pytest.raises(RequestError, match="The step smooth stands behind gptq"):
        pipeline.build_transforms(planned(["gptq", "smooth"]))
    for settings in (planned(["smooth", "gptq", "rotate"]), planned(["gptq", "smooth"], "auto")):
        assert pipeline.build_transforms(settings)  # a rewrite goes first, and so do the steps that a method names


def test_a_step_of_others_making_that_rounds_nothing_is_told_when_it_is_seen(
    random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Idle:
        Options = NoOptions

        def __init__(self, options: NoOptions) -> None: ...

        def apply(self, *given: object) -> dict[str, dict[str, float]]:
            return {}

    find = registry.transforms.get
    monkeypatch.setattr(registry.transforms, "get", lambda name: Idle if name == "idle" else find(name))
    settings = recipe.validate({"name": "x", "steps": {"idle": {}}, "calibration": {"samples": 2, "length": 16}})
    with pytest.raises(RequestError, match=r"No step \(idle\) has rounded model\.layers\.0\."):
        qtoolkit.quantize(random_llama, settings, tmp_path / "out")


def test_a_damaged_part_of_an_interrupted_run_is_told(random_llama: Path, tmp_path: Path) -> None:
    class Stop:
        def start(self, blocks: int, done: int) -> None: ...
        def say(self, text: str) -> None: ...
        def block(self, name: str, error: float) -> None:
            if name.endswith("1"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qtoolkit.quantize(random_llama, "w4a8", tmp_path / "out", changes=QUICK, progress=Stop())
    part = tmp_path / "out.partial" / "block-00000.safetensors"
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(QToolkitError, match=r"block-00000\.safetensors of an interrupted run is damaged"):
        qtoolkit.quantize(random_llama, "w4a8", tmp_path / "out", changes=QUICK)
    with pytest.raises(RequestError, match=r"another recipe\.calibration\.seed 0, now 9\."):
        qtoolkit.quantize(random_llama, "w4a8", tmp_path / "out", changes={**QUICK, "calibration.seed": 9})


def test_a_damaged_part_is_told_even_if_parts_are_only_joined(
    random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: pipeline.Run, job: Job) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Run, "assemble", killed)
        with pytest.raises(KeyboardInterrupt):
            qtoolkit.quantize(random_llama, "w4a8", tmp_path / "out", changes=QUICK)
    part = tmp_path / "out.partial" / "rest-00000.safetensors"
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(QToolkitError, match=r"rest-00000\.safetensors of an interrupted run is damaged") as caught:
        qtoolkit.quantize(random_llama, "w4a8", tmp_path / "out", changes=QUICK)
    assert "--fresh" in caught.value.hint
    assert qtoolkit.quantize(random_llama, "w4a8", tmp_path / "out", changes=QUICK, fresh=True).ok
