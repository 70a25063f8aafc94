"""What a language model's evaluation says, as a page: the sentence, the headline figures, and which sections it has."""

from __future__ import annotations

from qtoolkit.checkpoint import Manifest
from qtoolkit.evals.report import decisions, facts, losses, scores
from qtoolkit.evals.report.page import Card, Page
from qtoolkit.evals.report.words import percent, plus_minus, short, short_name, signed_percent, size, title
from qtoolkit.evals.results import EvalResult

PARTS = (
    scores.perplexity,
    scores.divergence,
    scores.tasks,
    scores.served,
    facts.layers,
    losses.section,
    decisions.section,
    facts.sizes,
    facts.latency,
    facts.measured,
    facts.provenance,
)


def page(result: EvalResult) -> Page:
    """Return the whole report of one evaluation; a part that was not measured is left out."""
    sections = tuple(section for part in PARTS if (section := part(result)))
    return Page(
        title=title(result.name),
        badge=result.scheme or f"float, {result.dtype}",
        lead=lead(result),
        cards=_cards(result),
        sections=sections,
        legend=_legend(result),
        foot=f"qtoolkit {result.versions.get('qtoolkit', '')}, {result.date[:10]}, {result.machine.processor}.",
    )


def lead(result: EvalResult) -> str:
    """Return the result in one sentence."""
    said = []
    first = next(iter(result.perplexity), None)
    if first and first in result.ppl_change and result.reference:
        change, was = result.ppl_change[first].value, result.reference.perplexity[first].token
        direction = "rises" if change >= 0 else "falls"
        said.append(
            f"perplexity {direction} by {percent(abs(change))} ({was:.2f} to {result.perplexity[first].token:.2f})"
        )
    elif first:
        said.append(f"perplexity is {result.perplexity[first].token:.2f} per token")
    if result.divergence:
        said.append(f"the likeliest next token stays the same in {percent(result.divergence.top1)} of all places")
    if result.manifest:
        said.append(f"the weights take {_ratio(result.manifest)} times less space")
    if not said and result.tasks:
        said.append(f"scored on {', '.join(result.tasks)}")
    text = ", ".join(said[:-1]) + (" and " if len(said) > 1 else "") + said[-1] if said else "nothing was measured"
    compared = f"Against {title(result.reference.name)}, " if result.reference else ""
    return f"{compared}{text}." if compared else f"{text[0].upper()}{text[1:]}."


def _cards(result: EvalResult) -> tuple[Card, ...]:
    cards = []
    for name, score in list(result.perplexity.items())[:1]:
        if name in result.ppl_change:
            change = result.ppl_change[name]
            cards.append(Card("Perplexity", signed_percent(change.value), plus_minus(change.stderr, percent)))
        else:
            cards.append(Card("Perplexity", f"{score.token:.2f}", plus_minus(score.stderr, lambda x: f"{x:.2f}")))
    if found := result.divergence:
        times = (
            f"{found.kl / found.floor.kl:.0f} times the noise floor"
            if found.floor and found.floor.kl
            else "nats per token"
        )
        cards.append(Card("KL divergence", short(found.kl), times))
        cards.append(Card("Same top token", percent(found.top1), f"of {found.tokens} places"))
    if result.task_change:
        changes = [change.value for change in result.task_change.values()]
        count = f"mean of {len(changes)} tasks" if len(changes) > 1 else next(iter(result.task_change))
        cards.append(Card("Tasks", f"{round(100 * sum(changes) / len(changes), 1) + 0.0:+.1f}", f"points, {count}"))
    if result.manifest:
        note = f"{size(result.manifest.bytes_before)} to {size(result.manifest.bytes_after)}"
        cards.append(
            Card(
                "Weights, times smaller",
                f"{_ratio(result.manifest)}x",
                note,
            )
        )
    return tuple(cards)


def _legend(result: EvalResult) -> tuple[tuple[str, str], ...]:
    mine = (short_name(result), "packed")
    return (("float", "float"), mine) if result.reference or result.manifest else (mine,)


def _ratio(manifest: Manifest) -> str:
    return f"{manifest.bytes_before / max(manifest.bytes_after, 1):.1f}"
