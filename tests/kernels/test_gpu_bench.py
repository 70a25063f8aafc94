"""The GPU benchmark script: its arithmetic, and a whole run of it on a CPU."""

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from qtoolkit.evals.gpu_bench import contenders, correctness, report, session, steps, tuning
from qtoolkit.evals.gpu_bench.clock import CpuClock
from qtoolkit.evals.gpu_bench.contenders import Contender, Weight
from qtoolkit.evals.gpu_bench.session import Run
from qtoolkit.kernels import tables
from qtoolkit.kernels.cuda import backend, plan
from qtoolkit.kernels.cuda.source import Tiling

from .cuda_emulator import COMPILER, Emulator

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_gpu.py"
_SPEC = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
bench_gpu = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(bench_gpu)


def test_the_roofline_is_bytes_for_few_tokens_and_arithmetic_for_many() -> None:
    few = report.roofline(1, 8192, 8192, 3.35e12, 1.979e15)
    many = report.roofline(4096, 8192, 8192, 3.35e12, 1.979e15)
    assert few == pytest.approx(8192 * 8192 / 2 / 3.35e12 * 1e6, rel=0.01)
    assert many == pytest.approx(277.8, rel=0.001)


def test_ratios_exist_where_both_were_measured() -> None:
    def at(median: float) -> dict[str, float]:
        return {"median": median}

    times = {"ours": {"8x8": {"1": at(10.0), "2": at(10.0)}}, "torch.mm bf16": {"8x8": {"1": at(30.0)}}}
    assert report.ratios(times, "ours", "torch.mm bf16") == {"8x8": {"1": 3.0}}
    assert report.best_peer(times, ["torch.mm bf16", "nobody"], "8x8", "1") == ("torch.mm bf16", 30.0)
    assert report.best_peer(times, ["nobody"], "8x8", "1") is None


def test_packing_agrees_with_the_checkpoints_layout() -> None:
    from qtoolkit.kernels.reference import unpack_int4

    weight = contenders.random_weight(16, 64, 32, "cpu")
    assert torch.equal(unpack_int4(weight.packed(), 64), weight.codes)
    assert weight.scales.shape == (16, 2)


def test_the_check_sees_a_wrong_and_an_unwritten_output() -> None:
    weight = contenders.random_weight(32, 128, -1, "cpu")
    x = torch.randn(4, 128)
    exact = correctness.want(x, weight, None)
    assert correctness.distance(exact.bfloat16(), exact) < correctness.BOUND[torch.bfloat16]
    assert correctness.distance(exact.roll(1, 0).bfloat16(), exact) > 0.1
    exact_with_hole = exact.clone()
    exact_with_hole[2, 3] = torch.nan
    assert correctness.distance(exact_with_hole, exact) == float("inf")


def test_a_run_on_a_cpu_writes_its_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    words = ["--device", "cpu", "--shapes", "136x264", "--tokens", "1,20", "--repeats", "2", "--out", str(out)]
    assert bench_gpu.main(words) == 0
    result = json.loads(out.read_text())
    assert result["checks"]["wrong"] == []
    assert set(result["times"]["ours"]["136x264"]) == {"1", "20"}
    assert result["finished"] is True
    assert "say nothing about the kernels" in capsys.readouterr().out


def test_a_plan_needs_no_gpu_and_names_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_gpu, "find_spec", lambda name: None if name == "gemlite" else name)
    assert bench_gpu.main(["--plan"]) == 0
    said = capsys.readouterr().out
    assert "ours: 70 points" in said
    assert all(contender.name + ":" in said for contender in contenders.CONTENDERS)
    assert "gemlite is not installed" in said
    assert "humming is not installed" not in said


@pytest.mark.parametrize("words", [["--only", "nobody"], ["--shapes", "4096"], ["--tokens", "x"]])
def test_a_wrong_request_is_refused_in_words(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_gpu.main(["--out", str(tmp_path / "r.json"), *words]) == 2
    assert "bench_gpu: " in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert bench_gpu.main(["--out", str(tmp_path / "r.json")]) == 1
    assert "no CUDA device" in capsys.readouterr().err


def test_a_run_that_is_killed_leaves_a_result_that_can_be_reported(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--shapes", "264x264", "--tokens", "1,300"]
    process = subprocess.Popen([*command, "--repeats", "1000000", "--out", str(out)], stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not out.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert json.loads(out.read_text())["finished"] is False
    done = subprocess.run([sys.executable, str(SCRIPT), "--report", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cut short" in done.stdout


def test_a_step_that_never_returns_is_ended_and_what_there_was_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "GRACE", 0.0)
    ended: list[int] = []
    run = Run("cpu", CpuClock(), time.monotonic() + 0.05, tmp_path / "r.json", {"times": {"ours": {}}})
    run.guard(ended.append).join()
    kept = json.loads((tmp_path / "r.json").read_text())
    assert ended == [1]
    assert kept["times"] == {"ours": {}}
    assert "did not return" in kept["could_not"][0]


def doubling(weight: Weight) -> Callable[[torch.Tensor], Callable[[], object]]:
    dense = 2 * weight.dense().T
    return lambda x: lambda: torch.mm(x, dense)


def failing(weight: Weight) -> Callable[[torch.Tensor], Callable[[], object]]:
    raise RuntimeError("no such kernel\nand its log")


def sleeping(weight: Weight) -> Callable[[torch.Tensor], Callable[[], object]]:
    return lambda x: lambda: time.sleep(0.02)


def test_what_fails_is_slow_or_wrong_is_named_and_the_rest_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run("cpu", CpuClock(), time.monotonic() + 100, tmp_path / "r.json")
    monkeypatch.setattr(run, "share", lambda left: time.monotonic() + 0.01)
    slow = Contender("slow", "w4a8", sleeping, whole=False)
    field = [Contender("fails", "w4a8", failing), slow, Contender("wrong", "w4a8", doubling), contenders.YARDSTICK]
    steps.grid(run, field[:2], ["32x64"], [1, 2, 4], 1)
    monkeypatch.undo()
    steps.grid(run, field[2:], ["32x64"], [1, 2], 1)
    kept = json.loads((tmp_path / "r.json").read_text())
    assert set(kept["times"]["torch.mm bf16"]["32x64"]) == {"1", "2"}
    assert set(kept["times"]["slow"]["32x64"]) < {"1", "2", "4"}
    notes = "\n".join(run.could_not)
    assert "fails 32x64: RuntimeError: no such kernel" in notes
    assert "its share of" in notes
    assert "wrong: its result is not the layer's" in notes
    assert kept["errors"]["torch.mm bf16"] < 0.01


def test_out_of_time_is_said_once_a_step() -> None:
    run = Run("cpu", CpuClock(), time.monotonic() - 1)
    assert run.attempt("a thing", lambda: pytest.fail("it ran")) is None
    assert run.could_not == ["a thing: out of time"]


@pytest.fixture
def emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulator = Emulator(tmp_path)

    @contextmanager
    def place_of(x: torch.Tensor) -> Iterator[backend.Place]:
        yield emulator.place(everything_readable=True)

    monkeypatch.setattr(backend, "place_of", place_of)


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
def test_the_scripts_own_check_and_tuner_call_the_kernels_as_they_want_it(
    emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [Tiling(8, 1, 2, 2), Tiling(8, 1, 2, 2, fused=True)]
    monkeypatch.setattr(plan, "candidates", lambda *size: few)
    weight = contenders.random_weight(128, 512, -1, "cpu")
    cases = list(correctness._tilings_of(weight, 5, is_chained=False))
    assert [case["right"] for case in cases] == [True, True]
    once = CpuClock()
    once.times = lambda call, repeats: [call() or 1.0]  # type: ignore[method-assign, func-returns-value]
    own, scales = backend.prepare(weight.packed(), weight.scales, backend.Problem(512, 128, -1, torch.bfloat16, "cuda"))
    assert set(tuning.measure(Run("cpu", once, 0.0), own, scales, 5, 128, 512, -1)) == set(few)


def test_tuning_writes_a_table_that_the_choice_then_follows(
    emulated: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test 80GB")
    monkeypatch.setattr(tuning, "environment", lambda device: {"date": "2026-11-21"})

    def measured(run: Run, own: object, scales: object, m: int, n: int, k: int, group_size: int) -> dict[Tiling, float]:
        found = plan.candidates(m, n, k, group_size != -1)
        return {tiling: 1.0 if tiling == found[0] else 2.0 for tiling in found}

    monkeypatch.setattr(tuning, "measure", measured)
    run = Run("cpu", CpuClock(), time.monotonic() + 100)
    path = tuning.tune(run, ["256x256"], [1, 32], tmp_path)
    assert run.result["tuning"] == {"points": 4, "estimate_over_best": 2.0}
    assert len(tables.read(path, "cuda", plan.COLUMNS, plan.refuse_row)) == 4
    monkeypatch.setenv("QTOOLKIT_TUNING", str(tmp_path))
    assert plan.choose(20, 256, 256, False, "NVIDIA Test 80GB") == plan.candidates(32, 256, 256, False)[0]
    assert plan.choose(20, 256, 256, False, "another card") == plan.estimate(20, 256, 256, False)
