"""Draws SVG that takes its colours and letters from the page around it, so one drawing fits light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 5.0  # inches of 72 units: drawn for a phone's width, so that letters stay readable there
# Matplotlib wants colours; these stand for the page's variables and are replaced by them in the SVG.
INK, MUTED, GRID, FLOAT, PACKED, CHANCE, ON_PACKED = (f"#0000{n:02x}" for n in range(1, 8))
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    FLOAT: "float",
    PACKED: "packed",
    CHANCE: "chance",
    ON_PACKED: "on-packed",
}
STYLE: Any = {
    "svg.fonttype": "none",  # letters stay letters: the page's font, and they can be searched
    "svg.hashsalt": "qtoolkit",  # the same data gives the same bytes
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "ytick.left": False,
    "axes.axisbelow": True,
}


@dataclass(frozen=True)
class Point:
    """A value with its standard error, if known."""

    value: float
    error: float | None = None


def pairs(
    names: Sequence[str],
    packed: Sequence[Point],
    floats: Sequence[Point | None],
    chance: Sequence[float | None],
    unit: str,
) -> str:
    """Draw one row a name: the float model's value over the packed model's, with whiskers of one standard error."""
    with _style():
        figure, axes = _canvas(0.75 + 0.62 * len(names))
        for row, (mine, theirs, guess) in enumerate(zip(packed, floats, chance, strict=True)):
            if theirs:
                _whisker(axes, theirs, row - 0.14, FLOAT)
            _whisker(axes, mine, row + (0.14 if theirs else 0), PACKED)
            if guess is not None:
                axes.plot([guess, guess], [row - 0.32, row + 0.32], color=CHANCE, linewidth=1.2, dashes=(2, 2))
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(axis="x")
        axes.set_xlabel(unit)
        axes.margins(x=0.12)
        return _svg(figure)


def steps(changes: Sequence[float], mean: Point) -> str:
    """Draw the change in percent window by window, with the mean and its standard error as a band."""
    from matplotlib.ticker import MaxNLocator

    with _style():
        figure, axes = _canvas(2.3)
        axes.axhline(0, color=MUTED, linewidth=1)
        if mean.error:
            axes.axhspan(mean.value - mean.error, mean.value + mean.error, color=PACKED, alpha=0.18, linewidth=0)
        axes.axhline(mean.value, color=PACKED, linewidth=1.4)
        axes.plot(range(1, len(changes) + 1), changes, "o", color=PACKED, markersize=4.5, alpha=0.75, markeredgewidth=0)
        axes.grid(axis="y")
        axes.set_xlabel("window of the text")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:+.3g} %")
        axes.tick_params(axis="y", colors=MUTED)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        return _svg(figure)


def distances(rows: Sequence[tuple[str, float, float]], packed: int) -> str:
    """Draw (name, mean, 99th percentile) on a logarithmic axis; row ``packed`` is the model, the others are noise."""
    with _style():
        figure, axes = _canvas(0.8 + 0.5 * len(rows))
        for row, (_, mean, p99) in enumerate(rows):
            colour = PACKED if row == packed else FLOAT
            axes.plot([mean, p99], [row, row], color=colour, linewidth=2, alpha=0.55, solid_capstyle="round")
            axes.plot([mean], [row], "o", color=colour, markersize=8)
            axes.plot([p99], [row], "|", color=colour, markersize=11, markeredgewidth=2)
        axes.set_xscale("log")
        axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="x")
        axes.set_xlabel("nats per token")
        axes.minorticks_off()
        return _svg(figure)


def cells(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], xlabel: str) -> str:
    """Draw a table of shares as tinted cells, values[row][column]; the strongest tint is the largest value."""
    from matplotlib.patches import Rectangle

    top = max((value for line in values for value in line if value is not None), default=1.0) or 1.0
    with _style():
        figure, axes = _canvas(0.55 + 0.36 * len(rows))
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                if value is None:
                    continue
                axes.add_patch(Rectangle((x, y), 1, 1, color=GRID, alpha=0.5, linewidth=0))
                share = value / top
                axes.add_patch(Rectangle((x, y), 1, 1, color=PACKED, alpha=round(0.06 + 0.94 * share, 3), linewidth=0))
                if len(columns) <= 8:
                    colour = ON_PACKED if share > 0.62 else INK
                    text = f"{value * 100:.2f}" if top < 0.1 else f"{value * 100:.1f}"
                    axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=10, color=colour)
        axes.set_xlim(0, len(columns))
        axes.set_ylim(len(rows), 0)
        every = max(1, len(columns) // 10)
        places = range(0, len(columns), every)
        axes.set_xticks([place + 0.5 for place in places], [columns[place] for place in places])
        axes.set_yticks([place + 0.5 for place in range(len(rows))], rows)
        axes.tick_params(length=0)
        axes.spines["bottom"].set_visible(False)
        axes.set_xlabel(xlabel)
        return _svg(figure)


def bars(rows: Sequence[tuple[str, float, str]]) -> str:
    """Draw (name, value, label) as bars from zero; the last one is the packed model's."""
    with _style():
        figure, axes = _canvas(0.3 + 0.42 * len(rows))
        for row, (_, value, label) in enumerate(rows):
            colour = PACKED if row == len(rows) - 1 else FLOAT
            axes.barh(row, value, height=0.62, color=colour, linewidth=0)
            _beside(axes, value, row, label)
        axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.set_xlim(0, max(value for _, value, _ in rows) * 1.28)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        return _svg(figure)


def ranking(rows: Sequence[tuple[str, float, str]]) -> str:
    """Draw (name, value, label) as bars of one colour."""
    with _style():
        figure, axes = _canvas(0.3 + 0.3 * len(rows))
        axes.barh(range(len(rows)), [value for _, value, _ in rows], height=0.66, color=PACKED, linewidth=0)
        for row, (_, value, label) in enumerate(rows):
            _beside(axes, value, row, label)
        axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.set_xlim(0, max(value for _, value, _ in rows) * 1.25)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        return _svg(figure)


def twins(rows: Sequence[tuple[str, float, float, str]]) -> str:
    """Draw (name, float model's value, packed model's value, label) as two bars a row, float above packed."""
    with _style():
        figure, axes = _canvas(0.3 + 0.42 * len(rows))
        for row, (_, before, after, label) in enumerate(rows):
            axes.barh(row - 0.18, before, height=0.32, color=FLOAT, linewidth=0)
            axes.barh(row + 0.18, after, height=0.32, color=PACKED, linewidth=0)
            _beside(axes, max(before, after), row, label)
        axes.set_yticks(range(len(rows)), [name for name, _, _, _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, (max(max(before, after) for _, before, after, _ in rows) or 1.0) * 1.28)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        return _svg(figure)


def curve(values: Sequence[float], xlabel: str) -> str:
    """Draw values as one line over 1, 2, 3 ..."""
    from matplotlib.ticker import MaxNLocator

    with _style():
        figure, axes = _canvas(2.3)
        axes.plot(range(1, len(values) + 1), values, "o-", color=PACKED, markersize=4.5, linewidth=1.4)
        axes.grid(axis="y")
        axes.set_xlabel(xlabel)
        axes.tick_params(axis="y", colors=MUTED)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        return _svg(figure)


def parts(rows: Sequence[tuple[str, float, float, float]]) -> str:
    """Draw (name, weights, activations, inherited) as shares: the first two as one bar, the last as a ring."""
    with _style():
        figure, axes = _canvas(0.5 + 0.42 * len(rows))
        for row, (_, weights, activations, inherited) in enumerate(rows):
            axes.barh(row, weights, height=0.62, color=PACKED, linewidth=0)
            axes.barh(row, activations, left=weights, height=0.62, color=PACKED, alpha=0.4, linewidth=0)
            axes.plot([inherited], [row], "o", color=INK, markersize=7, markerfacecolor="none")
        axes.set_yticks(range(len(rows)), [name for name, _, _, _ in rows])
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value * 100:.3g} %")
        axes.grid(axis="x")
        return _svg(figure)


def _whisker(axes: Axes, point: Point, y: float, colour: str) -> None:
    if point.error:
        axes.plot([point.value - point.error, point.value + point.error], [y, y], color=colour, linewidth=2, alpha=0.6)
    axes.plot([point.value], [y], "o", color=colour, markersize=8, markeredgewidth=0)


def _beside(axes: Axes, value: float, row: int, label: str) -> None:
    axes.annotate(label, (value, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=10)


def _style() -> Any:
    import matplotlib

    return matplotlib.rc_context(STYLE)


def _canvas(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(WIDTH, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    return figure, axes


def _svg(figure: Figure) -> str:
    """Return the drawing as an <svg> element for a page: no prologue, no metadata, the page's variables as colours."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL
    )  # a style would hold everywhere
    svg = re.sub(
        r'<svg .*?viewBox="([^"]+)".*?>',
        r'<svg viewBox="\1" role="img" aria-hidden="true">',
        svg,
        count=1,
        flags=re.DOTALL,
    )
    svg = re.sub(r'xlink:href="', 'href="', svg)
    for colour, name in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.strip()
