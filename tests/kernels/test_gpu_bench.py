"""The GPU benchmark script: its arithmetic, and a whole run of it on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qtoolkit.evals.gpu_bench import contenders, correctness, report

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_gpu.py"


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


def test_a_run_on_a_cpu_writes_its_result(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--shapes", "136x264", "--tokens", "1,20"]
    done = subprocess.run([*command, "--repeats", "2", "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["checks"]["wrong"] == []
    assert set(result["times"]["ours"]["136x264"]) == {"1", "20"}
    assert "say nothing about the kernels" in done.stdout
