"""The report of an evaluation: report.json, report.md and report.html, made from one page of sections."""

from __future__ import annotations

import os
from pathlib import Path

from qtoolkit.errors import DataError, RequestError
from qtoolkit.evals.extras import need
from qtoolkit.evals.report import image_classifier, language_model, render
from qtoolkit.evals.report.page import Page
from qtoolkit.evals.results import EvalResult
from qtoolkit.evals.vision import VisionResult

NAMES = ("report.json", "report.md", "report.html")


def prepare(folder: str | Path) -> Path:
    """Make the folder a report will go to, before hours are spent on the figures.

    Raises:
        RequestError: there is a file of that name, it cannot be written to, or a package for drawing is missing.
    """
    need("A report", "jinja2", "matplotlib")
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"No report can be written to {path}: {error.strerror}.", "-o takes a folder.") from None
    if not os.access(path, os.W_OK):
        raise RequestError(f"No report can be written to {path}: no permission.", "-o takes a folder.")
    return path


def write(result: EvalResult | VisionResult, folder: Path) -> list[Path]:
    """Write an evaluation's report and return its files: JSON, Markdown, HTML."""
    return write_page(_page(result), result.model_dump_json(indent=1), folder)


def _page(result: EvalResult | VisionResult) -> Page:
    return language_model.page(result) if isinstance(result, EvalResult) else image_classifier.page(result)


def write_page(page: Page, data: str, folder: Path) -> list[Path]:
    """Write any pipeline's page, with its figures ``data`` as JSON text, and return the files.

    Raises:
        DataError: the disk is full or refuses.
    """
    written = []
    for name, text in zip(NAMES, (data + "\n", render.markdown(page), render.html(page)), strict=True):
        path = folder / name
        temporary = path.with_name(name + ".tmp")
        try:
            temporary.write_text(text, "utf-8")
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise DataError(f"{path} could not be written: {error.strerror}.", "Is there space left?") from None
        written.append(path)
    return written


def lines(result: EvalResult | VisionResult) -> list[str]:
    """Return what a terminal shows: the sentence and the tables that are always open."""
    page = _page(result)
    shown = [f"{page.title} ({page.badge}): {page.lead}"]
    for section in page.sections:
        tables = [table for table in section.tables if not table.folded and not table.prose]
        if tables:
            shown += ["", section.title, *render.plain(tables)]
    return shown
