"""`qtoolkit eval` from the outside: one JSON object, exit codes, gates, reports, errors before the work starts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qtoolkit import cli

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 20


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "foxes.txt"
    path.write_text(TEXT, "utf-8")
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Run the command in this process, on one thread, and return its exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qtoolkit", "eval", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small run fastest so, and on a busy machine by far
    yield call
    torch.set_num_threads(before)


def test_json_is_one_object_with_everything(run: Any, random_llama: Path, text_file: Path, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = [{"query": "a", "choices": ["b", "c"], "gold": gold} for gold in (0, 1, 0)]
    (tasks / "piqa.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    code, out, _ = run(
        random_llama, "--reference", random_llama, "--ppl", text_file, "--tasks", "piqa", "--task-dir", tasks,
        "--limit", 2, "--latency", "-o", tmp_path / "report", "--fail-above", "kl=0.1", "--json",
    )  # fmt: skip
    assert code == 0
    data = json.loads(out)
    assert data["ok"] is True
    assert data["perplexity"]["foxes"]["token"] == data["reference"]["perplexity"]["foxes"]["token"]
    assert data["perplexity"]["foxes"]["window"] == 256  # the model's context
    assert data["kl"] == 0
    assert data["divergence"]["floor_dtype"] == "float32"
    assert 0 < data["divergence"]["floor"]["kl"] < 1e-2  # bfloat16 rounding
    assert data["tasks"]["piqa"]["documents"] == 2
    assert data["task_change"]["piqa"]["value"] == 0
    assert data["latency"]["tokens_per_second"] > 0
    assert [Path(path).is_file() for path in data["report"]] == [True] * 3


def test_words_go_to_stdout_and_progress_to_stderr(run: Any, random_llama: Path, text_file: Path) -> None:
    code, out, err = run(random_llama, "--ppl", text_file)
    assert code == 0
    assert "Perplexity is" in out
    assert "loading" in err
    assert "loading" not in out


def test_gate_that_fails_exits_3_with_the_numbers(
    run: Any, random_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    bad = ("--fail-above", "ppl.foxes=2", "--window", 64)
    code, _, err = run(random_llama, "--ppl", text_file, *bad, "-o", tmp_path / "report")
    assert code == 3
    assert "ppl.foxes is" in err
    assert "The report has the details" in err
    code, _, err = run(random_llama, "--ppl", text_file, *bad)
    assert code == 3
    assert "Add -o DIR" in err
    assert "The report" not in err
    assert "above 2" in err
    assert (tmp_path / "report" / "report.html").is_file()  # what failed can be looked at
    code, out, _ = run(random_llama, "--ppl", text_file, *bad, "--json")
    assert code == 3
    data = json.loads(out)
    assert (data["ok"], data["exit_code"]) == (False, 3)
    assert data["perplexity"]["foxes"]["token"] > 2


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--fail-above", "pl=3"], 2, "ppl"),
        (["--fail-above", "kl=3"], 2, "kl"),  # without a reference there is none
        (["--fail-above", "ppl"], 2, "metric=value"),
        (["--ppl", "sampel"], 2, "sample"),
        (["--ppl", "none", "--tasks", "piqa", "--task-dir", "/nowhere"], 2, "/nowhere"),
        (["--backend", "tgi"], 2, "hf or vllm"),
        (["--tasks", "piqa", "--limit", "0"], 2, "--limit 1"),
        (["--window", "4096"], 2, "256"),
        (["--reference", "nowhere"], 2, "'nowhere'"),
        (["--endpoint", "http://127.0.0.1:9"], 1, "No answer"),
    ],
)
def test_wrong_request_is_one_sentence(
    run: Any, random_llama: Path, arguments: list[str], code: int, said: str
) -> None:
    found, out, err = run(random_llama, *arguments, "--json")
    assert found == code
    data = json.loads(out)
    assert data["ok"] is False
    assert said in data["error"] + data["hint"]
    assert "Traceback" not in err
    assert "perplexity of" not in err  # told before anything is measured


def test_text_shorter_than_a_window_is_a_data_error(run: Any, random_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short", "utf-8")
    code, _, err = run(random_llama, "--ppl", tmp_path / "short.txt")
    assert code == 1
    assert "10 tokens, but one window takes 256" in err


def test_model_that_is_not_there_is_refused(run: Any, tmp_path: Path) -> None:
    code, _, err = run(tmp_path / "nowhere")
    assert code == 2
    assert "nowhere" in err
