"""The command line as a user meets it: what is printed where, exit codes, one JSON object, no traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from foreign_support import GPTQ, gptq, write

from qtoolkit import cli

QUICK = ["--samples", "4", "--length", "32", "--group-size", "64", "--set", "smooth.grid=5"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process; return exit code, stdout and stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["qtoolkit", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


def test_help_names_every_command(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for command in ("quantize", "compress", "convert", "serve", "eval", "bench", "inspect", "list", "doctor"):
        assert command in out
    assert run()[1] == out


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["quantise"], 2, "quantize"),
        (["quantize", "tiny"], 2, "output folder"),
        (["quantize", "nowhere", "-o", "x"], 2, "'nowhere'"),
        (["quantize", "tiny", "-o", "x", "--samples", "many"], 2, "--samples"),
        (["quantize", "tiny", "-o", "x", "--recipe", "w4a9"], 2, "w4a8"),
        (["quantize", "tiny", "-o", "x", "--w4a8", "--recipe", "rtn"], 2, "--recipe"),
        (["quantize", "tiny", "-o", "x", "--set", "gptq.dampin=1"], 2, "damping"),
        (["quantize", "tiny", "-o", "x", "--set", "damping"], 2, "step.key=value"),
        (["quantize", "tiny", "-o", "x", "--set", "gptq.damping=["], 2, "gptq.damping"),
        (["quantize", "tiny", "-o", "x", "--set", "gptq.damping={a: 1}"], 2, "steps.gptq.damping:"),
        (["quantize", "tiny", "-o", "x", "--outliers", "turn"], 2, "outliers.method:"),
        (["quantize", "tiny", "-o", "x", "--seed", "99999999999999999999"], 2, "calibration.seed"),
        (["quantize", "tiny", "-o", "x", "--group-size", "100"], 2, "100"),
        (["quantize", "org/name", "-o", "x"], 1, "tiny"),
        (["inspect", "nowhere"], 2, "nowhere"),
        (["convert", "tiny", "--to", "int4"], 2, "output folder"),
        (["convert", "tiny", "-o", "x"], 2, "layout"),
        (["convert", "tiny", "-o", "x", "--to", "gpt"], 2, "gptq"),
        (["convert", "tiny", "-o", "x", "--to", "gptq"], 2, "not quantized"),
        (["convert", "nowhere", "-o", "x", "--to", "gptq"], 2, "'nowhere'"),
        (["quantize", "tiny", "--dry-run", "--outliers", "turn"], 2, "'auto'"),
        (["quantize", "tiny", "--dry-run", "--device", "foo"], 2, "not a device"),
        (["quantize", "tiny", "--dry-run", "--data", "nothere.txt"], 2, "nothere.txt"),
        (["quantize", "tiny", "--dry-run", "--data", ""], 2, "no data ''"),
        (["quantize", "tiny", "--dry-run", "--group-size", "100000"], 1, "100000"),
        (["quantize", "tiny", "--dry-run", "--budget", "2bpw"], 2, "alone takes 4."),
        (["quantize", "tiny", "--dry-run", "--budget", "100bpw"], 2, "every layer in float"),
        (["quantize", "tiny", "--dry-run", "--budget", "inf"], 2, "budget.bits"),
        (["quantize", "tiny", "--dry-run", "--set", "gptq.damping=.inf"], 2, "finite"),
        (["compress", "digits-mlp", "--dry-run", "--epochs", "-3"], 2, "--epochs"),
        (["compress", "digits-mlp", "--dry-run", "--epochs", "0"], 2, "--epochs"),
        (["compress", "digits-mlp", "--dry-run", "--samples", "0"], 2, "--samples"),
        (["compress", "digits-mlp", "--dry-run", "--set", "budget.bits=4.5"], 2, "for language models"),
        (["compress", "digits-mlp", "--dry-run", "--set", "outliers.method=auto"], 2, "for language models"),
        (["list", "recipe"], 2, "recipes"),
        (["bench", "kernels", "--tokens", "one"], 2, "--tokens"),
        (["bench", "kernels", "--tokens", "0"], 2, "Example: --tokens 1"),
        (["bench", "kernels", "--shapes", "0x0"], 2, "Example: --shapes 4096x"),
        (["bench", "kernels", "--shapes", "7x5"], 2, "multiples of 128"),
        (["bench", "kernels", "--shapes", "128"], 2, "KxN"),
        (["bench", "kernels", "--shapes", "128x128x128"], 2, "KxN"),
        (["bench", "kernels", "--seconds", "0"], 2, "--seconds 0"),
        (["bench", "kernels", "--seconds", "-1"], 2, "Example: --seconds"),
        (["bench", "kernels", "--seconds", "nan"], 2, "Example: --seconds"),
        (["bench", "vision-kernels", "--seconds", "0"], 2, "Example: --seconds"),
        (["eval", "tiny", "--limit", "3"], 2, "--tasks"),
        (["eval", "tiny", "--task-dir", "x"], 2, "--tasks"),
        (["bench", "serve"], 2, "--int4"),
        (["bench", "serve", "--int4", "nowhere"], 2, "nowhere"),
    ],
)
def test_a_wrong_request_is_one_sentence_with_a_hint(words: list[str], code: int, says: str, run: Run) -> None:
    found, out, err = run(*words)
    assert found == code, err
    assert out == ""
    assert says in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) <= 2
    found, out, _ = run(*words, "--json")
    assert found == code
    assert json.loads(out)["exit_code"] == code
    assert json.loads(out)["ok"] is False


def test_dry_run_prints_the_recipe_and_writes_nothing(run: Run, random_llama: Path, tmp_path: Path) -> None:
    code, out, _ = run("quantize", random_llama, "-o", tmp_path / "out", *QUICK, "--dry-run", "--json")
    assert code == 0
    recipe = json.loads(out)["recipe"]
    assert recipe["calibration"]["samples"] == 4
    assert recipe["scheme"]["group_size"] == 64
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("part", "code", "says"),
    [
        ({"packer": "foo"}, 2, "packer"),
        ({"packer": "nm"}, 2, "stores no layers"),
        ({"packer": "gptq", "budget": {"bits": 5}}, 2, "int8 weights"),
        ({"steps": {}}, 2, "add gptq"),
        ({"scheme": {"weight_bits": 8}}, 1, "packer: int8"),
        ({"steps": {"gptq": {}, "smooth": {}}}, 2, "behind gptq"),
        ({"keep": ["mlp.down"]}, 2, "mlp.down_proj"),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses(
    part: dict[str, Any], code: int, says: str, run: Run, random_llama: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps({"name": "mine", "steps": {"gptq": {}}, **part}))  # JSON is YAML
    for words in (["--dry-run"], ["-o", tmp_path / "out"]):
        found, out, err = run("quantize", random_llama, "--recipe", file, *words)
        assert (found, out) == (code, "")
        assert says.lower() in err.lower()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_precedence_is_set_then_flag_then_file(run: Run, random_llama: Path, tmp_path: Path) -> None:
    from qtoolkit import recipe

    file = tmp_path / "mine.yaml"
    file.write_text(recipe.load("w4a8", {"calibration.seed": 7, "calibration.samples": 7}).to_yaml())
    words = ["--recipe", file, "--samples", 3, "--set", "calibration.samples=5", "--set", "calibration.length=64"]
    out = run("quantize", random_llama, *words, "--dry-run", "--json")[1]
    found = json.loads(out)["recipe"]["calibration"]
    assert (found["samples"], found["length"], found["seed"]) == (5, 64, 7)
    words = ["digits-mlp", "--seed", 3, "--samples", 4, "--set", "calibration.samples=5", "--dry-run", "--json"]
    found = json.loads(run("compress", *words)[1])["recipe"]["calibration"]
    assert (found["samples"], found["seed"]) == (5, 3)


def test_quantize_prints_what_it_promises_and_inspect_reads_it(run: Run, random_llama: Path, tmp_path: Path) -> None:
    code, out, err = run("quantize", random_llama, "-o", tmp_path / "out", "--w4a8", *QUICK, "--json")
    assert code == 0, err
    result: dict[str, Any] = json.loads(out)
    assert set(result) >= {
        "ok", "output", "scheme", "seconds", "bytes_before", "bytes_after", "peak_rss_bytes", "layers",
    }  # fmt: skip
    assert set(result["layers"][0]) >= {"name", "scheme", "error"}
    for number in (1, 2):
        assert f"block {number}/2 model.layers.{number - 1}: error" in err

    code, out, _ = run("inspect", tmp_path / "out", "--json")
    assert code == 0
    assert len(json.loads(out)["layers"]) == len(result["layers"])
    code, out, _ = run("inspect", tmp_path / "out", "--layers")
    assert code == 0
    assert "model.layers.1.mlp.down_proj" in out

    code, out, err = run("quantize", random_llama, "-o", tmp_path / "out", "--w4a8", *QUICK)
    assert code == 2
    assert "--fresh" in err


def test_convert_prints_what_it_did_and_inspect_shows_it(run: Run, random_llama: Path, tmp_path: Path) -> None:
    words = ["--recipe", "rtn", "--samples", "1", "--length", "16"]
    assert run("quantize", random_llama, "-o", tmp_path / "int4", *words)[0] == 0
    code, _, err = run("quantize", tmp_path / "int4", "--dry-run")
    assert (code, "already quantized" in err) == (1, True)
    code, out, err = run("convert", tmp_path / "int4", "-o", tmp_path / "gptq", "--to", "gptq")
    assert code == 0, err
    assert "14 layers, int4 -> gptq" in out
    assert len(out.splitlines()) == 1
    assert "QTOOLKIT_W4A8=always" in err
    assert f"converted  from int4, {tmp_path / 'int4'}" in run("inspect", tmp_path / "gptq")[1]
    code, out, _ = run("convert", tmp_path / "gptq", "-o", tmp_path / "back", "--to", "int4", "--json")
    answer = json.loads(out)
    assert (answer["ok"], answer["layout_before"], answer["layout"], answer["scale_error"]) == (True, "gptq", "int4", 0)


def test_inspect_of_what_another_tool_quantized_claims_no_errors(run: Run, random_llama: Path, tmp_path: Path) -> None:
    write(random_llama, tmp_path / "theirs", GPTQ, gptq)
    assert run("convert", tmp_path / "theirs", "-o", tmp_path / "ours", "--to", "int4")[0] == 0
    code, out, _ = run("inspect", tmp_path / "ours", "--layers")
    assert code == 0
    assert "not known: another tool" in out
    assert "error" not in out
    assert "nothing was calibrated" in out


def test_doctor_and_list_answer_as_data(run: Run) -> None:
    code, out, _ = run("doctor", "--json")
    facts = json.loads(out)
    assert code == 0
    assert {row["scheme"] for row in facts["kernels"] if row["device"] == "cpu"} == {"W4A8-g128", "W4A8-channel"}
    code, out, _ = run("list", "--json")
    assert code == 0
    listed = json.loads(out)
    assert {"w4a8", "rtn"} <= listed["recipes"].keys()
    assert {"llama", "qwen2", "qwen3"} <= listed["architectures"].keys()


def test_a_bug_is_told_as_a_bug(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: str) -> None:
        raise ZeroDivisionError("one over nothing")

    monkeypatch.setattr("qtoolkit.checkpoint.verify", broken)
    code, _, err = run("inspect", "x")
    assert code == 70
    assert "A bug in qtoolkit: ZeroDivisionError: one over nothing" in err


def test_an_interrupt_is_told_and_has_its_code(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qtoolkit.checkpoint.verify", interrupted)
    code, out, err = run("inspect", "x")
    assert (code, out) == (130, "")
    assert "Interrupted" in err
    code, out, _ = run("inspect", "x", "--json")
    assert (code, json.loads(out)["exit_code"]) == (130, 130)
