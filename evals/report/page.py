"""The nouns of a report, the same for every pipeline: a page of sections with text, tables and figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

HALF, GAP = 61, 2  # characters of a table that half the page takes, and of the room between two columns


@dataclass(frozen=True)
class Table:
    """Rows under a head; the first column is text, the others are figures.

    Attributes:
        folded: words of the line that opens it; empty for a table that is always open.
        prose: every column is text.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    folded: str = ""
    prose: bool = False

    @property
    def fits_beside(self) -> bool:
        """Tell whether half the page is wide enough: cells take one line, heads wrap at spaces."""
        longest = [max(map(len, head.split()), default=0) for head in self.head]
        for row in self.rows:
            longest = [max(width, len(cell)) for width, cell in zip(longest, row, strict=True)]
        return not self.prose and sum(longest) + GAP * len(longest) <= HALF


@dataclass(frozen=True)
class Figure:
    """A drawing whose data stands in the section's tables, too.

    Attributes:
        draw: returns the drawing as SVG, from ``plots``; called for HTML only, so nothing else needs matplotlib.
        title: what it says, one line.
        caption: how to read it.
    """

    draw: Callable[[], str]
    title: str
    caption: str = ""


@dataclass(frozen=True)
class Code:
    """A block of text that is shown letter by letter, such as a recipe."""

    title: str
    text: str


@dataclass(frozen=True)
class Section:
    """A part of the page: paragraphs, then figures, tables and code."""

    title: str
    text: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    code: tuple[Code, ...] = ()


@dataclass(frozen=True)
class Card:
    """One headline figure.

    Attributes:
        tone: "good", "bad" or "" for neither; only where a figure says so by itself.
    """

    label: str
    value: str
    note: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Page:
    """A whole report.

    Attributes:
        title: the model's name.
        badge: one or two words beside it, such as the scheme.
        lead: the result in one sentence.
        legend: what the two colours of the figures stand for, (name, "float" or "packed"); empty without figures.
        foot: where and when it was made.
    """

    title: str
    badge: str
    lead: str
    cards: tuple[Card, ...]
    sections: tuple[Section, ...]
    legend: tuple[tuple[str, str], ...]
    foot: str
