"""The ablation's table: a row says, seed by seed, how much more KL a change has than the default."""

import sys
from pathlib import Path

import pytest
from tests_support import save_random

ROOT = Path(__file__).resolve().parents[2]


def test_rows_are_compared_with_the_default_seed_by_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import ablate_quality

    model, text = save_random(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("A line of text, and one more of it.\n" * 200)
    words = [str(model), "--data", str(text), "--text", str(text), "--samples", "4", "--length", "32", "--window", "64"]
    words += ["--windows", "2", "--groups", "32", "--seeds", "0", "1", "--only", "default", "rounding to nearest"]
    monkeypatch.setattr(sys, "argv", ["ablate_quality.py", *words])
    ablate_quality.main()
    default, nearest = (line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:])
    assert (default[0], nearest[0]) == ("| default", "| rounding to nearest")
    first, own = (float(row[1].split()[0]) for row in (default, nearest))
    assert "%" not in default[1]
    more = float(nearest[1].split("(")[1].split()[0])
    assert more > 10
    assert more == pytest.approx(100 * (own / first - 1), rel=0.3)  # the mean of ratios, not their means' ratio


def test_what_a_row_has_more_is_the_mean_of_the_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from ablate_quality import Score, cell

    before = [Score(0.001, 0.0, 1.0), Score(0.004, 0.0, 1.0)]
    after = [Score(0.0011, 0.01, 2.0), Score(0.0052, 0.03, 4.0)]
    assert cell(after, before) == "3.15 ± 2.90 (+20.0 ± 14.14 %) | +2.00 ± 1.41 | 3"
    assert cell(before) == "2.50 ± 2.12 | +0.00 ± 0.00 | 1"
