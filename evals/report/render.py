"""A page as HTML in one file, as Markdown, and as lines for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qtoolkit.evals.report.page import Page, Section, Table

if TYPE_CHECKING:
    from jinja2 import Environment


def html(page: Page) -> str:
    """Return one HTML document with everything in it: style, drawings, no script, nothing from elsewhere."""
    return _environment().get_template("report.html.jinja").render(page=page)


def markdown(page: Page) -> str:
    """Return the page as Markdown; figures are left out, their data stands in the tables."""
    parts = [f"# {page.title} ({page.badge})", page.lead]
    if page.cards:
        parts.append(
            _markdown_table(Table(("", "", ""), tuple((card.label, card.value, card.note) for card in page.cards)))
        )
    for section in page.sections:
        parts += _markdown_section(section)
    parts.append(f"*{page.foot}*")
    return "\n\n".join(parts) + "\n"


def plain(tables: Sequence[Table]) -> list[str]:
    """Return tables as lines for a terminal, columns in line."""
    lines: list[str] = []
    for table in tables:
        widths = [max(len(row[column]) for row in (table.head, *table.rows)) for column in range(len(table.head))]
        for row in (table.head, *table.rows):
            first, rest = (
                row[0].ljust(widths[0]),
                [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)],
            )
            lines.append("  ".join([f"  {first}", *rest]).rstrip())
        lines.append("")
    return lines[:-1]


def _markdown_section(section: Section) -> list[str]:
    parts = [f"## {section.title}", *section.text]
    for table in section.tables:
        if table.folded:
            parts += [f"<details><summary>{table.folded}</summary>", _markdown_table(table), "</details>"]
        else:
            parts.append(_markdown_table(table))
    parts += [f"{code.title}:\n\n```yaml\n{code.text}\n```" for code in section.code]
    return parts


def _markdown_table(table: Table) -> str:
    rest = "---" if table.prose else "---:"
    rows = [table.head, ("---", *[rest] * (len(table.head) - 1)), *table.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("qtoolkit.evals", "templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
