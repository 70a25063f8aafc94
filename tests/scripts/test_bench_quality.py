"""The parts of the quality bench that run without peers: contract, evaluator, rounding, table, cache and reasons."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qtoolkit
from qtoolkit import data, lightly, memory
from qtoolkit.errors import CheckpointError
from qtoolkit.evals import divergence, perplexity, windows

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
WORDS = "the old river of this country was a long road for every town and its people "


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


def part(name: str) -> ModuleType:
    return importlib.import_module(f"quality_peers.{name}")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(WORDS * 20)
    return path


@pytest.fixture
def evaluator(random_llama: Path, text: Path) -> Any:
    measure = part("measure")
    return measure.Evaluator(random_llama, measure.Settings((str(text), "sample"), windows=2, length=64))


def float_weights(folder: Path) -> dict[str, torch.Tensor]:
    return part("contract").tensors(qtoolkit.load(folder, dtype=torch.float32))


def test_float_scores_are_the_perplexity_that_evals_measures(random_llama: Path, evaluator: Any, text: Path) -> None:
    found = evaluator.float_scores()
    model = qtoolkit.load(random_llama, dtype=torch.float32)
    cut = windows.cut("words", text.read_text(), evaluator.tokenizer, 64)
    first = windows.Windows("words", cut.ids[:2], cut.words, cut.utf8_bytes)
    assert found["ppl"]["words"] == pytest.approx(perplexity.of_model(model, first).token, rel=1e-6)
    assert set(found["ppl"]) == {"words", "sample"}


def test_float_weights_lose_only_what_int8_activations_cost(random_llama: Path, evaluator: Any, tmp_path: Path) -> None:
    measure = part("measure")
    model = qtoolkit.load(random_llama, dtype=torch.float32)
    measure.put(model, {name: tensor.clone() for name, tensor in float_weights(random_llama).items()})
    assert evaluator._score(model, divergence=True)["kl"] == 0  # the very same model, before its inputs are rounded
    save_file({n: t.detach().clone() for n, t in float_weights(random_llama).items()}, tmp_path / "w.safetensors")
    rounded = evaluator.scores(tmp_path / "w.safetensors")
    assert 0 < rounded["kl"] < 1e-3  # int8 per token: a relative error near 0.4 % of a layer's input


def test_the_divergence_is_the_one_that_evals_measures(random_llama: Path, evaluator: Any, tmp_path: Path) -> None:
    measure, weights = part("measure"), float_weights(random_llama)
    rounded = {n: part("rtn").round_weight(t, 128) if "proj" in n else t for n, t in weights.items()}
    save_file({n: t.detach().clone() for n, t in rounded.items()}, tmp_path / "w.safetensors")
    model = qtoolkit.load(random_llama, dtype=torch.float32)
    measure.put(model, load_file(tmp_path / "w.safetensors"))
    measure.round_inputs(model)
    expected = divergence.measure(evaluator.reference, model, evaluator.windows[0], "cpu")
    assert evaluator.scores(tmp_path / "w.safetensors")["kl"] == pytest.approx(expected.kl, rel=1e-6)


def test_the_evaluator_multiplies_what_our_own_runtime_multiplies(random_llama: Path, tmp_path: Path) -> None:
    """Dequantized weights under rounded inputs give the logits of the packed checkpoint."""
    measure = part("measure")
    packed = tmp_path / "packed"
    qtoolkit.quantize(random_llama, "rtn", packed, changes={"calibration.samples": 1, "calibration.length": 16})
    model = qtoolkit.load(random_llama, dtype=torch.float32)
    measure.put(model, part("contract").tensors(qtoolkit.load(packed, dtype=torch.float32, activations=False)))
    measure.round_inputs(model)
    ids = torch.arange(40).view(1, 40)
    with torch.no_grad():
        ours, served = model(ids).logits, qtoolkit.load(packed, dtype=torch.float32)(ids).logits
    assert (ours - served).abs().max() < 1e-3 * served.abs().max()  # sums in another order, now and then another code


def test_ours_takes_its_share_of_text_from_the_tokens_that_every_peer_gets(
    random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contract = part("contract")
    tokens = torch.randint(5, 100, (16, 32), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    monkeypatch.setattr(data, "text_tokens", data.text_tokens)  # what the peer puts there goes again
    monkeypatch.setattr(memory, "keep_little", lambda: None)  # these change the process for good
    monkeypatch.setattr(lightly, "work_alone", lambda: None)
    run, seen = data.calibration_tokens, []

    def watch(*args: Any, **kwargs: Any) -> Any:
        seen.append(run(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(data, "calibration_tokens", watch)
    job = contract.Job(
        "ours", "ours", str(random_llama), str(tmp_path / "tokens.safetensors"), 64, 0, {"recipe": "rtn"}
    )
    part("ours").quantize(job, contract.Meter())
    assert torch.equal(seen[0][0], tokens[:14])
    assert seen[0][1].shape == (2, 32)


def test_a_head_with_weights_of_its_own_is_untied(tmp_path: Path) -> None:
    from tests_support import save_random

    measure, contract = part("measure"), part("contract")
    model = qtoolkit.load(save_random(tmp_path / "tied", "llama", tie_word_embeddings=True), dtype=torch.float32)
    weights = {name: tensor.detach().clone() for name, tensor in contract.tensors(model).items()}
    assert "lm_head.weight" not in weights
    measure.put(model, weights | {"lm_head.weight": 2 * weights["model.embed_tokens.weight"]})
    assert torch.equal(model.lm_head.weight, 2 * model.model.embed_tokens.weight)
    assert torch.equal(model.model.embed_tokens.weight, weights["model.embed_tokens.weight"])


def test_weights_that_do_not_fit_are_refused_by_name(random_llama: Path) -> None:
    weights = float_weights(random_llama)
    missing = {name: tensor for name, tensor in weights.items() if name != "model.norm.weight"}
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        part("measure").put(qtoolkit.load(random_llama, dtype=torch.float32), missing)


@pytest.mark.parametrize("group_size", [16, -1])
def test_rounding_to_nearest_has_codes_of_four_bits_and_errors_of_half_a_step(group_size: int) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    rounded = part("rtn").round_weight(weight, group_size)
    groups = weight.view(8, -1, 64 if group_size == -1 else group_size)
    step = groups.abs().amax(-1, keepdim=True) / 7.5
    codes = rounded.view_as(groups) / step
    assert (codes - codes.round()).abs().max() < 1e-4
    assert codes.min() > -8.001
    assert codes.max() < 7.001
    inside = groups < 7.5 * step  # the largest positive value is cut to 7 steps: half a step, too
    assert ((rounded.view_as(groups) - groups).abs() <= 0.5001 * step)[inside].all()


def test_a_weight_of_zeros_stays_zero() -> None:
    assert torch.equal(part("rtn").round_weight(torch.zeros(4, 32), 16), torch.zeros(4, 32))


def test_bits_count_the_scales() -> None:
    contract = part("contract")
    assert contract.bits([(256, 256), (64, 128)], 128) == 4 + 16 / 128
    assert contract.bits([(256, 256)], contract.CHANNEL) == 4 + 16 / 256


def test_a_job_reads_back_as_it_was_written(tmp_path: Path) -> None:
    contract = part("contract")
    job = contract.Job("rtn", "rtn", "model", "tokens", 128, 3, {"recipe": "w4a8"})
    assert contract.Job.read(job.write(tmp_path)) == job


def test_a_meter_measures_this_process_and_not_its_parent(tmp_path: Path) -> None:
    held = torch.ones(150_000_000)  # 600 MB, touched: what getrusage would charge to the child
    code = "from quality_peers.contract import Meter\nm = Meter()\nwith m: pass\nprint(m.peak_rss_bytes, m.seconds)"
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS, capture_output=True, text=True, check=True)
    peak, seconds = done.stdout.split()
    assert int(peak) < held.nbytes
    assert float(seconds) >= 0


def test_the_official_second_level_rounds_to_one_int8_grid_a_row() -> None:
    """The formula of its group kernel, evaluated element by element."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (3, 8), generator=generator).float()
    scale = torch.rand(3, 2, generator=generator) + 0.1
    weight = codes * scale.repeat_interleave(4, dim=1)
    extra = weight.abs().amax(1, keepdim=True) / 127
    found = part("qqq").served(weight, scale, extra)
    for n in range(3):
        for k in range(8):
            second = (scale[n, k // 4] / extra[n, 0]).half().float()
            assert found[n, k] == torch.round(codes[n, k] * second) * extra[n, 0]


def test_the_hadamard_transform_is_the_matrix_it_stands_in_for() -> None:
    matrix = torch.ones(1, 1)
    for _ in range(3):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(part("qqq").hadamard(x, 0.5), x @ matrix * 0.5, atol=1e-6)


def run_row(kl: float, ppl: float) -> dict[str, Any]:
    return {"ppl": {"words": ppl}, "kl": kl, "tasks": {}, "seconds": 2.0, "peak_rss_bytes": 5e8, "bits": 4.125}


def test_the_table_shows_spread_reasons_and_our_share_of_the_best_loss() -> None:
    table = part("table")
    rows = [
        table.Row("rtn", [run_row(0.01, 10.1)]),
        table.Row("peer", [run_row(0.4, 10.3), run_row(0.6, 10.5)]),
        table.Row("absent", reason="not installed: --install absent"),
        table.Row("qtoolkit", [run_row(0.2, 10.2), run_row(0.2, 10.2)]),
    ]
    found = table.markdown("model", "g128", {"ppl": {"words": 10.0}, "kl": 0.0, "tasks": {}}, rows)
    assert "| peer | 10.4000 ± 0.1000 | +4.000 ± 1.000 % | 0.50000 ± 0.10000 | 2.0 | 500 | 4.125 |" in found
    assert "| absent | cannot run: not installed: --install absent |" in found
    assert "words: qtoolkit loses +0.2000, 0.50 of the best peer's (peer, +0.4000)" in found  # rounding is none
    assert "KL: qtoolkit 0.20000, 0.40 of the best peer's (peer)" in found
    width = {line.count("|") for line in found.splitlines() if line.startswith("|")}
    assert len(width) == 1


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "bench_quality.py"), *words]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_run_prints_the_table_and_goes_on_from_what_is_there(random_llama: Path, text: Path, tmp_path: Path) -> None:
    words = [
        "--models", str(random_llama), "--calibrate", str(text), "--texts", str(text), "--window", "64",
        "--windows", "1", "--samples", "2", "--length", "32", "--seeds", "0", "--groups", "128",
        "--cache", str(tmp_path / "cache"), "--venvs", str(tmp_path / "none"),
        "--peers", "rtn,torchao", "--json", str(tmp_path / "out.json"),
    ]  # fmt: skip
    first = bench(*words)
    assert first.returncode == 0, first.stderr
    assert "| torchao | cannot run: not installed: --install torchao |" in first.stdout
    assert "rtn quantizes" in first.stderr
    found = json.loads((tmp_path / "out.json").read_text())["results"][0]
    assert found["peers"][0]["runs"][0]["kl"] > 0
    again = bench(*words)
    assert again.stdout == first.stdout
    assert "rtn quantizes" not in again.stderr


def test_without_texts_only_seconds_memory_and_bits_are_measured(
    random_llama: Path, text: Path, tmp_path: Path
) -> None:
    done = bench(
        "--models", str(random_llama), "--calibrate", str(text), "--texts", "--samples", "2", "--length", "32",
        "--seeds", "0", "--groups", "128", "--cache", str(tmp_path / "cache"), "--peers", "rtn",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("| rtn"))
    _, _, kl, seconds, megabytes, bits, _ = (cell.strip() for cell in row.split("|"))
    assert kl == ""
    assert float(seconds) >= 0
    assert float(megabytes) > 100  # torch alone takes more
    assert float(bits) == 4.125


def test_an_unknown_peer_is_refused_with_the_known_ones(text: Path) -> None:
    done = bench("--calibrate", str(text), "--peers", "awq")
    assert done.returncode == 2
    assert "no peer 'awq'; there are rtn, qtoolkit, llmcompressor" in done.stderr
