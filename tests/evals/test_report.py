"""The report: JSON that reads back, Markdown with every figure, HTML that stands alone."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qtoolkit.checkpoint import Conversion
from qtoolkit.errors import DataError, RequestError
from qtoolkit.evals import report
from qtoolkit.evals.report import facts, language_model, plots, render
from qtoolkit.evals.report.page import Figure, Page, Section, Table
from qtoolkit.evals.results import EvalResult, read_result


class Reader(HTMLParser):
    """Collects the tags that are open at the end, what could load something, and the visible text."""

    VOID = ("meta", "br", "link", "img", "use", "path", "rect", "input", "hr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe", "object", "embed"):
            self.loads.append(tag)
        self.loads += [
            value or "" for name, value in attrs if name in ("src", "href") and not (value or "").startswith("#")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    return reader


def test_json_reads_back_as_it_was(result: EvalResult, tmp_path: Path) -> None:
    paths = report.write(result, tmp_path)
    assert [path.name for path in paths] == ["report.json", "report.md", "report.html"]
    back = read_result(paths[0])
    assert back.model_dump() == result.model_dump()
    assert EvalResult.model_validate(back.model_dump(mode="json")).model_dump() == result.model_dump()


def test_json_has_the_promised_keys(result: EvalResult) -> None:
    data = result.model_dump(mode="json")
    assert data["ok"] is True
    assert data["perplexity"]["sample"]["token"] == 11.0
    assert data["perplexity"]["sample"]["word"] == 121.0
    assert data["kl"] == 0.02
    assert data["tasks"]["piqa"]["metrics"]["acc"] == 0.5
    assert data["reference"]["perplexity"]["sample"]["token"] == 10.0
    assert "each" not in data["tasks"]["piqa"]  # one figure a document would swamp it


def test_html_stands_alone_and_is_well_formed(result: EvalResult, tmp_path: Path) -> None:
    html = report.write(result, tmp_path)[2].read_text("utf-8")
    reader = read(html)
    assert reader.loads == []
    assert not re.search(r"@import|url\((?!#)", html)
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


def test_html_shows_what_was_measured(result: EvalResult, tmp_path: Path) -> None:
    words = " ".join(" ".join(read(report.write(result, tmp_path)[2].read_text("utf-8")).text).split())
    for said in (
        "perplexity rises by 10.00 % (10.00 to 11.00)",
        "20 times the noise floor",
        "W4A8-g128",
        "org/<small>",  # escaped in the source, or it would be a tag
        "kept by the recipe",
        "model.layers.2.mlp.down_proj",
        "4.0x",
        "50.0 ± 2.0",
        "+0.100 %",
        "seed 7",
        "name: w4a8",
        "4 of 100 piqa",
    ):
        assert said in words


def test_figures_take_the_pages_colours_and_keep_their_words(result: EvalResult) -> None:
    page = language_model.page(result)
    figures = [figure for section in page.sections for figure in section.figures]
    assert len(figures) == 6  # perplexity twice, divergence, tasks, layers, sizes
    drawings = [figure.draw() for figure in figures]
    for svg in drawings:
        assert "var(--packed)" in svg
        assert not re.search(r"#0000(0[1-7])|xmlns|<metadata|<style|http", svg)
    assert "down_proj" in drawings[4]


def test_same_result_gives_the_same_bytes(result: EvalResult, tmp_path: Path) -> None:
    first = [path.read_bytes() for path in report.write(result, report.prepare(tmp_path / "a"))]
    assert first == [path.read_bytes() for path in report.write(result, report.prepare(tmp_path / "b"))]


def test_layers_without_block_numbers_are_ranked(result: EvalResult) -> None:
    assert result.manifest is not None
    errors = dict(zip(["stem", "head", "a", "b", "c", "d"], result.manifest.errors.values(), strict=True))
    figure = facts.layer_figure(errors)
    assert figure.title == "The 6 layers with the largest error"


def test_a_checkpoint_of_another_tool_has_no_errors_and_no_recipe(result: EvalResult) -> None:
    assert result.manifest is not None
    layers = tuple(layer.model_copy(update={"error": None}) for layer in result.manifest.layers)
    step = Conversion(source="theirs", digest="0", layout="gptq", scale_error=0)
    foreign = result.manifest.model_copy(update={"layers": layers, "recipe": {}, "converted": (step,)})
    page = language_model.page(result.model_copy(update={"manifest": foreign}))
    text = render.markdown(page)
    assert "from gptq, theirs" in text
    assert "calibrated on" not in text
    assert "layers were quantized" not in text


def test_markdown_has_the_tables(result: EvalResult) -> None:
    text = render.markdown(language_model.page(result))
    assert text.startswith("# small-w4a8 (W4A8-g128)\n")
    assert "| piqa, acc | 75.0 ± 2.0 | 50.0 ± 2.0 | -25.0 ± 25.0 |" in text
    assert "<svg" not in text


def test_reference_that_is_not_the_source_is_said(result: EvalResult) -> None:
    said = "not made from this reference"
    assert said not in render.markdown(language_model.page(result))
    other = result.model_copy(update={"reference_is_source": False})
    assert said in render.markdown(language_model.page(other))


def test_float_model_alone_gets_a_report(result: EvalResult, tmp_path: Path) -> None:
    assert result.reference is not None
    alone = EvalResult.model_validate(
        {
            **result.reference.model_dump(),
            "tasks": {},
            **{k: getattr(result, k) for k in ("seconds", "date", "versions")},
        }
        | {"machine": result.machine}
    )
    text = report.write(alone, tmp_path)[1].read_text("utf-8")
    assert "Perplexity is 10.00 per token." in text
    assert "## Layers" not in text


def test_other_pipelines_write_their_own_sections(tmp_path: Path) -> None:
    section = Section("Accuracy", ("On a test set.",), tables=(Table(("", "right"), (("resnet", "91.2 %"),)),))
    page = Page("resnet", "4:8", "All is well.", (), (section,), (), "today")
    _, markdown, html = report.write_page(page, "{}", tmp_path)
    assert "| resnet | 91.2 % |" in markdown.read_text("utf-8")
    assert "91.2 %" in read(html.read_text("utf-8")).text


def test_a_table_too_wide_for_half_the_page_stands_below_its_figure(tmp_path: Path) -> None:
    figure = Figure(lambda: "<svg></svg>", "a figure")
    narrow = Table(("model", "same top token"), (("W4A8-g128", "89.47 %"),))
    wide = Table(("task", "float", "W4A8-g128", "change"), (("lambada_openai, perplexity", *["56.0 ± 10.1"] * 3),))
    assert (narrow.fits_beside, wide.fits_beside) == (True, False)
    for table, places in ((narrow, "two"), (wide, "one")):
        page = Page("m", "b", "lead", (), (Section("s", figures=(figure,), tables=(table,)),), (), "")
        text = next(path for path in report.write_page(page, "{}", tmp_path) if path.suffix == ".html").read_text(
            "utf-8"
        )
        assert f'<div class="{places}">' in text


def test_terminal_shows_the_same_figures(result: EvalResult) -> None:
    lines = report.lines(result)
    assert lines[0].startswith("small-w4a8 (W4A8-g128): Against <small>, perplexity rises")
    assert any(line.split()[:3] == ["sample", "float", "10.00"] for line in lines)


def test_only_html_needs_matplotlib(result: EvalResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert report.lines(result)
    assert render.markdown(language_model.page(result))
    with pytest.raises(ImportError):
        render.html(language_model.page(result))


def test_whiskers_are_drawn_only_where_there_is_an_error() -> None:
    with_error = plots.pairs(["a"], [plots.Point(1.0, 0.1)], [None], [None], "x")
    without = plots.pairs(["a"], [plots.Point(1.0)], [None], [None], "x")
    line = "stroke: var(--packed)"  # a dot is filled, a whisker is a line
    assert line in with_error
    assert line not in without


@pytest.mark.parametrize("content", ["", "{}", '{"schema_version": 99}', "[1]"])
def test_other_json_is_not_a_report(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content, "utf-8")
    with pytest.raises(DataError, match="not a report"):
        read_result(tmp_path / "x.json")


def test_report_onto_a_file_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(RequestError, match="No report can be written"):
        report.prepare(tmp_path / "file")
