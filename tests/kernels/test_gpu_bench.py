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

from qtoolkit.evals.gpu_bench import contenders, correctness, report, session, steps, tuning, watch
from qtoolkit.evals.gpu_bench.clock import CpuClock
from qtoolkit.evals.gpu_bench.contenders import Contender, Weight
from qtoolkit.evals.gpu_bench.session import Run
from qtoolkit.kernels import folded, tables
from qtoolkit.kernels.cuda import backend, plan
from qtoolkit.kernels.cuda.source import Tiling
from qtoolkit.kernels.selection import Grid

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


@pytest.mark.parametrize("k", [128, 4096, 28672])
def test_foldable_weights_fold_and_are_of_the_size_of_others(k: int) -> None:
    weight = contenders.random_weight(16, k, 64, "cpu", fold=True)
    assert folded.split(weight.scales) is not None
    assert torch.equal(weight.scales.bfloat16().float(), weight.scales)
    outputs = torch.randn(64, k) @ weight.dense().float().T
    assert 0.3 < outputs.std() < 3.0  # about one


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
    assert {case["what"] for case in result["checks"]["cases"]} >= {
        f"check reference{grid} bfloat16 5x200x192 group 64" for grid in ("", " chained", " folded")
    }
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
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    while Path(f"/proc/{child}").exists() and time.monotonic() < until:  # what measures ends with what watches
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()
    assert json.loads(out.read_text())["finished"] is False
    done = subprocess.run([sys.executable, str(SCRIPT), "--report", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cut short" in done.stdout


MEASURES = """
import json, os, sys, time
from pathlib import Path
from qtoolkit.evals.gpu_bench.session import Run

out, how = Path(sys.argv[1]), sys.argv[2]
held = json.loads(out.read_text()) if out.exists() else {}
run = Run("cpu", None, time.monotonic() + 60, out, held, held.pop("could_not", []))
held["processes"] = held.get("processes", 0) + 1
run.attempt("before", lambda: held.update(before=True))
run.keep()
if how == "breaks":
    Run.answers = lambda run: False
steps = {"hangs": lambda: time.sleep(600), "breaks": lambda: 1 / 0, "dies": lambda: os.kill(os.getpid(), 9)}
for i in range(5):
    run.attempt(f"bad {i}", steps[how], of="bad", patience=0.5 if how == "hangs" else 60)
run.attempt("after", lambda: held.update(after=True))
run.keep(finished=True)
"""


@pytest.mark.parametrize(
    ("how", "why"),
    [("hangs", "a step did not return"), ("breaks", "the device answered no more"), ("dies", "the process died (-9)")],
)
def test_a_run_goes_on_without_the_step_that_ended_a_process(how: str, why: str, tmp_path: Path) -> None:
    """And after three such steps of one kind without the others of that kind."""
    out = tmp_path / "r.json"
    watch.supervise([sys.executable, "-c", MEASURES, str(out), how], out, time.monotonic() + 60)
    kept = json.loads(out.read_text())
    assert kept["finished"] is kept["before"] is kept["after"] is True
    assert kept["processes"] == 4
    assert kept["lost"] == [{"what": f"bad {i}", "of": "bad", "why": why} for i in range(3)]
    assert "bad 3: left out, for what happened before" in kept["could_not"]
    assert not session.step_file(out).exists()


def test_what_is_under_way_at_the_end_of_the_time_is_ended_and_nothing_else_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "GRACE", 0.0)
    out = tmp_path / "r.json"
    program = "import sys, pathlib, time; pathlib.Path(sys.argv[1]).write_text('99\\n\\nlong\\n'); time.sleep(600)"
    command = [sys.executable, "-c", program, str(session.step_file(out))]
    watch.supervise(command, out, time.monotonic() + 2)
    kept = json.loads(out.read_text())
    assert kept["could_not"] == ["long: the time was over"]
    assert kept["finished"] is False


def doubling(weight: Weight) -> Callable[[torch.Tensor], Callable[[], object]]:
    dense = 2 * weight.dense().T
    return lambda x: lambda: torch.mm(x, dense)


def failing(weight: Weight) -> Callable[[torch.Tensor], Callable[[], object]]:
    raise RuntimeError("no such kernel\nand its log")


def sleeping(weight: Weight) -> Callable[[torch.Tensor], Callable[[], object]]:
    return lambda x: lambda: time.sleep(0.2)


def test_what_fails_is_slow_or_wrong_is_named_and_the_rest_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run("cpu", CpuClock(), time.monotonic() + 100, tmp_path / "r.json")
    monkeypatch.setattr(run, "share", lambda left, reserve: time.monotonic() + 0.3)
    slow = Contender("slow", "w4a8", sleeping, whole=False)
    field = [Contender("fails", "w4a8", failing), slow, Contender("wrong", "w4a8", doubling), contenders.YARDSTICK]
    times = run.result.setdefault("times", {})
    steps.grid(run, field[:2], ["32x64"], [1, 2, 4], 1, times)
    monkeypatch.undo()
    steps.grid(run, field[2:], ["32x64"], [1, 2], 1, times)
    steps.void(run)
    run.keep()
    kept = json.loads((tmp_path / "r.json").read_text())
    assert set(kept["times"]["torch.mm bf16"]["32x64"]) == {"1", "2"}
    assert set(kept["times"]["slow"]["32x64"]) < {"1", "2", "4"}
    notes = "\n".join(run.could_not)
    assert "fails 32x64: RuntimeError: no such kernel" in notes
    assert "its share of" in notes
    assert "wrong: its result is not the layer's" in notes
    assert kept["errors"]["torch.mm bf16"] < 0.01


def test_points_that_are_there_are_not_timed_again(tmp_path: Path) -> None:
    run = Run("cpu", CpuClock(), time.monotonic() + 100)
    held = {"torch.mm bf16": {"32x64": {"1": {"median": 7.0}}}}
    steps.grid(run, [contenders.YARDSTICK], ["32x64"], [1, 2], 1, held)
    assert held["torch.mm bf16"]["32x64"]["1"] == {"median": 7.0}
    assert held["torch.mm bf16"]["32x64"]["2"]["median"] > 0


def test_checks_that_fail_are_wrong_and_the_others_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def cases(names: object, device: str, seed: int) -> list[correctness.Case]:
        outcomes = {"right": {"right": True}, "refused": {"refused": "of another card"}, "wrong": {"right": False}}
        made = [correctness.Case(what, "", lambda outcome=outcome: outcome) for what, outcome in outcomes.items()]
        return [correctness.Case("raises", "", lambda: 1 / 0), *made]

    monkeypatch.setattr(correctness, "operators", cases)
    run = Run("cpu", CpuClock(), time.monotonic() + 100)
    steps.check(run)
    checks = run.result["checks"]
    assert (checks["run"], checks["refused"]) == (3, 1)
    assert [case["what"] for case in checks["wrong"]] == ["raises", "wrong"]
    steps.check(run)
    assert len(run.result["checks"]["cases"]) == 4
    assert "raises: ZeroDivisionError: division by zero" in run.could_not


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
    cases = list(correctness.tilings_of(weight, 5, Grid.PLAIN))
    assert [case.run()["right"] for case in cases] == [True, True]
    foldable = contenders.random_weight(128, 512, 128, "cpu", fold=True)
    assert [case.run()["right"] for case in correctness.tilings_of(foldable, 5, Grid.FOLDED)] == [True, True]
    once = CpuClock()
    once.times = lambda call, repeats: [call() or 1.0]  # type: ignore[method-assign, func-returns-value]
    own, scales = backend.prepare(weight.packed(), weight.scales, backend.Problem(512, 128, -1, torch.bfloat16, "cuda"))
    run = Run("cpu", once, time.monotonic() + 100)
    assert set(tuning.measure(run, own, scales, 5, 128, 512, -1)) == set(few)
    run.result["lost"] = [{"what": f"tuning 5x128x512 group -1 by {few[0]}", "of": "cuda", "why": "it hung"}]
    assert set(tuning.measure(run, own, scales, 5, 128, 512, -1)) == {few[1]}


def test_tuning_writes_a_table_that_the_choice_then_follows(
    emulated: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test 80GB")
    monkeypatch.setattr(tuning, "environment", lambda device: {"date": "2026-11-21"})
    run = Run("cpu", CpuClock(), time.monotonic() + 100)
    with pytest.raises(RuntimeError, match="needs a CUDA device"):
        tuning.tune(run, ["256x256"], [1, 32], tmp_path)
    monkeypatch.setattr(backend, "refuse", lambda problem: None)

    def measured(run: Run, own: object, scales: object, m: int, n: int, k: int, group_size: int) -> dict[Tiling, float]:
        found = plan.candidates(m, n, k, group_size != -1)
        return {tiling: 1.0 if tiling == found[0] else 2.0 for tiling in found}

    monkeypatch.setattr(tuning, "measure", measured)
    path = tuning.tune(run, ["256x256"], [1, 32], tmp_path)
    assert run.result["tuning"] == {"points": 4, "estimate_over_best": 2.0}
    assert len(tables.read(path, "cuda", plan.COLUMNS, plan.refuse_row)) == 4
    monkeypatch.setenv("QTOOLKIT_TUNING", str(tmp_path))
    assert plan.choose(20, 256, 256, False, "NVIDIA Test 80GB") == plan.candidates(32, 256, 256, False)[0]
    assert plan.choose(20, 256, 256, False, "another card") == plan.estimate(20, 256, 256, False)
