"""The vision benchmark: every contestant is timed, ratios and limits are there, and answers are of the right shape."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from qtoolkit import cli
from qtoolkit.evals import vision_kernel_bench as bench
from qtoolkit.evals.vision_kernel_bench import Case
from qtoolkit.kernels.cpu.vision import library

pytestmark = pytest.mark.skipif(library.failure() is not None, reason=f"no vision kernels here: {library.failure()}")
SMALL = (Case(2, 32, 32, 8), Case(5, 64, 32))
NAMES = {"fp32", "binary", "2:4", "1:4", "1x2-50%", "1x16-50%", "1x16-75%"}


def test_every_contestant_of_a_case_computes_a_layer_of_that_shape() -> None:
    for case, shape in zip(SMALL, ((2, 32, 8, 8), (5, 32)), strict=True):
        for contestant in bench.contestants(case):
            answer = contestant.call()
            assert isinstance(answer, torch.Tensor)
            assert tuple(answer.shape) == shape, contestant.name
            assert contestant.name == "int8" or contestant.bits + contestant.flops > 0


def test_a_run_has_ratios_limits_and_at_least_five_turns() -> None:
    result = bench.run(SMALL, 0.0)
    assert {row["name"] for row in result["rows"]} >= NAMES
    assert all(row["runs"] >= 5 and row["min_us"] <= row["median_us"] <= row["max_us"] for row in result["rows"])
    assert all(row["against_fp32"] == 1.0 for row in result["rows"] if row["name"] == "fp32")
    assert all(value > 0 for value in result["limits"].values())
    assert len(bench.table(result).splitlines()) == 2 + len(result["rows"])


def test_the_command_prints_one_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CASES", SMALL)
    monkeypatch.setattr(bench.run, "__defaults__", (SMALL, 0.0, None))
    done = CliRunner().invoke(cli.app, ["bench", "vision-kernels", "--seconds", "0.001", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["ok"] is True
