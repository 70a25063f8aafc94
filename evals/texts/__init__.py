"""Texts that perplexity is measured on: shipped with the package, on this disk, or on the hub."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from qtoolkit.errors import DataError, RequestError, said
from qtoolkit.registry import suggest

BUILT_IN = ("sample",)
DEFAULT = "sample"


@dataclass(frozen=True)
class Text:
    """One text to score.

    Attributes:
        name: what the result calls it: the built-in or hub name, or the file's name without its ending.
        source: where it came from, for the report.
        text: the whole text, documents joined with an empty line.
    """

    name: str
    source: str
    text: str


def label(name: str) -> str:
    """Return what results call the text ``name``: a file's name without folder and ending, any other name itself."""
    path = Path(name).expanduser()
    return path.stem if path.is_file() else name


def load(name: str) -> Text:
    """Return the text called ``name``: ``sample``, ``wikitext2`` (the hub's test split), a file, or a hub data set.

    Raises:
        RequestError: no such built-in text, file or data set.
        DataError: the text is empty or cannot be read.
    """
    if name in BUILT_IN:
        return Text(name, f"built-in: {name}", (files(__name__) / f"{name}.txt").read_text("utf-8"))
    if name == "wikitext2":
        return Text(name, "Salesforce/wikitext, wikitext-2-raw-v1, test", _wikitext2())
    return _documents(name)


def _wikitext2() -> str:
    """Join every row of the test split, headings and empty rows too, as published figures do."""
    from datasets import load_dataset

    try:
        rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
    except (OSError, ValueError, RuntimeError) as error:  # offline or not in the cache
        raise DataError(
            f"wikitext2 could not be read from the hub: {said(error)}",
            "Without network, give a text file, or `--ppl sample`, which is built in.",
        ) from None
    return "\n\n".join(rows["text"])


def _documents(name: str) -> Text:
    from qtoolkit.data import HUB, documents

    path = Path(name).expanduser()
    if path.is_dir():
        raise RequestError(f"{name} is a folder, not a text.", "Give a .txt or .jsonl file.")
    if not path.is_file() and name not in HUB and name.count("/") != 1:
        raise RequestError(f"There is no text {name!r}: no such file or name.", suggest(name, {*BUILT_IN, *HUB}))
    return Text(label(name), name, "\n\n".join(documents(name)))
