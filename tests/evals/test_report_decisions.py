"""The report shows what a run decided, with the numbers."""

from __future__ import annotations

from qtoolkit.checkpoint import BudgetRecord, BudgetRow, Choice, Manifest
from qtoolkit.evals.report import language_model, render
from qtoolkit.evals.report.decisions import section
from qtoolkit.evals.results import EvalResult

CHOICE = Choice(
    chosen="rotate",
    divergence={"none": 0.5, "smooth": 0.25, "rotate": 0.125, "both": 0.13},
    blocks=("model.layers.2", "model.layers.6"),
    held_out_tokens=2048,
)
LOSS = {"W4A8-g128": 0.01, "W8A8-channel": 0.0002, "float": 0.0}
BUDGET = BudgetRecord(
    bits=4.5,
    used=4.4375,
    rows=(
        BudgetRow(layers=("model.layers.0.mlp.down_proj",), kind="W8A8-channel", loss=LOSS),
        BudgetRow(layers=("model.layers.0.self_attn.o_proj",), kind="W4A8-g128", loss=LOSS),
    ),
)


def with_decisions(result: EvalResult, choice: Choice | None, budget: BudgetRecord | None) -> EvalResult:
    assert result.manifest is not None
    values = result.manifest.model_dump() | {
        "choice": choice,
        "budget": budget,
        "notes": ("the embeddings are untied",),
    }
    return result.model_copy(update={"manifest": Manifest.model_validate(values)})


def test_the_page_says_what_was_decided_and_why(result: EvalResult) -> None:
    text = render.markdown(language_model.page(with_decisions(result, CHOICE, BUDGET)))
    assert "Outliers are treated by rotation" in text
    assert "2,048 tokens" in text
    assert "0.1250" in text
    assert "4.438 are used" in text
    assert "1 of 2 layers take more" in text
    assert "The embeddings are untied." in text


def test_a_checkpoint_without_decisions_has_no_such_section(result: EvalResult) -> None:
    assert section(result) is None
