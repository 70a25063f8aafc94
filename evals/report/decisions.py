"""The report's part on what a run decided by measurement: how outliers are treated, what a budget was spent on."""

from __future__ import annotations

from functools import partial

from qtoolkit.checkpoint import BudgetRecord, Choice
from qtoolkit.evals.report import plots
from qtoolkit.evals.report.page import Figure, Section, Table
from qtoolkit.evals.results import EvalResult

WORDS = {"none": "neither", "smooth": "smoothing", "rotate": "rotation", "both": "rotation and smoothing"}


def section(result: EvalResult) -> Section | None:
    """Show the choices that the checkpoint's own run measured, with the numbers behind them."""
    if not (manifest := result.manifest) or not (manifest.choice or manifest.budget or manifest.notes):
        return None
    text: list[str] = []
    figures: list[Figure] = []
    tables: list[Table] = []
    if choice := manifest.choice:
        text.append(_choice_text(choice))
        rows = [(WORDS.get(name, name), value, f"{value:.4f}") for name, value in choice.decisive.items()]
        figures.append(Figure(partial(plots.ranking, rows), "Divergence of each way, nats a token"))
        tables.append(Table(("outliers by", "divergence, nats"), tuple((name, text) for name, _, text in rows)))
    if budget := manifest.budget:
        text.append(_budget_text(budget))
        tables.append(_budget_table(budget))
    text += [f"{note[0].upper()}{note[1:]}." for note in manifest.notes]
    return Section("What was decided by measurement", tuple(text), tuple(figures), tuple(tables))


def _choice_text(choice: Choice) -> str:
    return (
        f"Outliers are treated by {WORDS.get(choice.chosen, choice.chosen)}. Every way was tried on "
        f"{', '.join(choice.blocks)}, one block quantized at a time, and judged by the divergence of the next token on "
        f"{choice.held_out_tokens:,} tokens that were not calibrated on."
    )


def _budget_text(budget: BudgetRecord) -> str:
    count = sum(len(row.layers) for row in budget.rows)
    raised = sum(len(row.layers) for row in budget.rows if row.kind != next(iter(_kinds(row.loss))))
    return (
        f"Of a budget of {budget.bits:g} bits a weight {budget.used:.3f} are used (codes and scales of the quantizable "
        f"layers): {raised} of {count} layers take more than the scheme's bits, where that saves most divergence a bit."
    )


def _kinds(loss: dict[str, float]) -> list[str]:
    """Return the kinds from the one that loses most, which is the smallest."""
    return sorted(loss, key=lambda kind: -loss[kind])


def _budget_table(budget: BudgetRecord) -> Table:
    kinds = _kinds(budget.rows[0].loss)
    rows = tuple(
        (", ".join(row.layers), row.kind, *(f"{row.loss[kind]:.5f}" for kind in kinds))
        for row in sorted(budget.rows, key=lambda row: -row.loss[kinds[0]])
    )
    return Table(("layers", "became", *(f"{kind}, nats" for kind in kinds)), rows, folded="What each layer would cost")
