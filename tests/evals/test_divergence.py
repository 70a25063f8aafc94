"""Divergence: zero for the same model, the textbook's value for a known one, a floor that stays small."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qtoolkit.errors import NumericError, RequestError
from qtoolkit.evals import divergence
from qtoolkit.evals.windows import Windows, cut


def fixed(logits: torch.Tensor) -> Any:
    """A model that says the same at every place: logits [vocabulary]."""

    def model(*, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=logits.expand(1, input_ids.shape[1], -1))

    model.config = SimpleNamespace(vocab_size=len(logits))  # type: ignore[attr-defined]
    return model


WINDOWS = Windows("zeros", torch.zeros(3, 10, dtype=torch.int64), words=1, utf8_bytes=1)


def test_a_model_has_no_divergence_from_itself(model: Any, tokenizer: Any, text: str) -> None:
    found = divergence.measure(model, model, cut("foxes", text[:200], tokenizer, 64))
    assert (found.kl, found.p99, found.top1) == (0, 0, 1)
    assert found.tokens == 192


def test_divergence_is_the_textbooks(model: Any) -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    found = divergence.measure(fixed(p.log()), fixed(q.log()), WINDOWS)
    assert found.kl == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-6)  # 0.25 ln 2
    assert found.p99 == pytest.approx(found.kl)
    assert (found.top1, found.stderr) == (0, pytest.approx(0, abs=1e-12))


def test_divergence_is_from_the_reference_to_the_model() -> None:
    sure, unsure = torch.tensor([8.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.0])
    there = divergence.measure(fixed(sure), fixed(unsure), WINDOWS).kl
    back = divergence.measure(fixed(unsure), fixed(sure), WINDOWS).kl
    assert there == pytest.approx(1.0986, abs=0.01)  # ln 3, less the little that is not certain
    assert back > 4


def test_a_shift_of_all_logits_changes_nothing() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0])
    found = divergence.measure(fixed(logits), fixed(logits + 100), WINDOWS)
    assert found.kl == pytest.approx(0, abs=1e-12)


def test_other_vocabulary_is_refused() -> None:
    with pytest.raises(RequestError, match="vocabulary of 3, the model one of 4"):
        divergence.measure(fixed(torch.zeros(3)), fixed(torch.zeros(4)), WINDOWS)


def test_nan_is_an_error() -> None:
    with pytest.raises(NumericError, match="zeros"):
        divergence.measure(fixed(torch.zeros(3)), fixed(torch.full((3,), float("nan"))), WINDOWS)
