"""The start-up line, and how it travels from an engine's workers to the launcher."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtoolkit.serve import report
from qtoolkit.serve.report import Layer

LAYERS = [
    Layer("a.qkv", "w4a8-cpu"),
    Layer("a.o", "w4a8-cpu"),
    Layer("b.o", "vllm-X", "too wide"),
    Layer("c", "vllm-X", "too wide"),
]


def test_the_line_counts_kernels_and_gives_each_reason_once() -> None:
    assert report.sentence(LAYERS) == (
        "qtoolkit: of 4 linear layers 2 on w4a8-cpu, 2 on vllm-X; not W4A8: b.o and 1 more: too wide."
    )


def test_a_model_without_linear_layers_has_a_line_too() -> None:
    assert report.sentence([]) == "qtoolkit: of 0 linear layers none."


def test_stages_are_read_back_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(report.FOLDER, str(tmp_path))
    report.write(LAYERS[:3], "stage-0")
    report.write(LAYERS[3:], "stage-1")
    assert report.read(tmp_path) == LAYERS
    assert report.kernels(report.read(tmp_path)) == {"w4a8-cpu": 2, "vllm-X": 2}


def test_nothing_is_written_when_nobody_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(report.FOLDER, raising=False)
    monkeypatch.chdir(tmp_path)
    report.write(LAYERS, "stage-0")
    assert list(tmp_path.iterdir()) == []
