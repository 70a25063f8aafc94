"""Perplexity by the fixed-window protocol: how surprised a model is by a text, per token and per word."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from qtoolkit.errors import ModelError, NumericError
from qtoolkit.evals.windows import Windows

CHUNK = 512  # positions whose logits are held in float32 at once: 512 x 152k vocabulary is 311 MB


class CausalModel(Protocol):
    """What is needed of a model: ``model(input_ids=int64 [1, tokens]).logits`` is [1, tokens, vocabulary]."""

    config: Any

    def __call__(self, *, input_ids: Tensor, use_cache: bool) -> Any:
        """Run the model."""


class Perplexity(BaseModel):
    """How surprised a model was by one text.

    Attributes:
        token: exp of the mean negative log-likelihood (nll) per token; what the literature calls perplexity.
        word: exp of the total nll per whitespace word; comparable between tokenizers.
        bits_per_byte: total nll in bits per UTF-8 byte; comparable between tokenizers.
        stderr: standard error of ``token``, from the spread between windows; None with one window.
        tokens: tokens that were predicted.
        window: tokens in a window.
        window_nll: mean nll in nats of each window, for paired comparisons.
    """

    model_config = ConfigDict(extra="forbid")

    token: float
    word: float
    bits_per_byte: float
    stderr: float | None
    tokens: int = Field(ge=1)
    window: int
    window_nll: list[float]


def of_model(model: CausalModel, windows: Windows, device: str | torch.device = "cpu") -> Perplexity:
    """Measure the perplexity of ``model`` on ``windows``.

    Raises:
        ModelError: the text has token ids outside the model's vocabulary.
        NumericError: the model computed NaN or Inf.
    """
    return summarize(windows, (window_nll(model, ids.to(device)) for ids in windows.ids))


@torch.inference_mode()
def window_nll(model: CausalModel, ids: Tensor) -> float:
    """Return the mean negative log-likelihood, in nats, of ids[1:] given what stands before each; ids is [length]."""
    logits = logits_of(model, ids)[:-1]  # [length - 1, vocabulary]
    total = 0.0
    for part, target in zip(logits.split(CHUNK), ids[1:].split(CHUNK), strict=True):
        total += F.cross_entropy(part.float(), target, reduction="none").double().sum().item()
    return total / (len(ids) - 1)


def logits_of(model: CausalModel, ids: Tensor) -> Tensor:
    """Return the logits [length, vocabulary] after each token of ids [length].

    Raises:
        ModelError: an id lies outside the vocabulary.
    """
    vocabulary = getattr(model.config, "vocab_size", None)
    if vocabulary is not None and int(ids.max()) >= vocabulary:
        raise ModelError(
            f"The tokenizer gave id {int(ids.max())}, but the model's vocabulary has {vocabulary} entries.",
            "Is this model's own tokenizer in its folder?",
        )
    return model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0]


def summarize(windows: Windows, means: Iterable[float]) -> Perplexity:
    """Turn every window's mean nll into perplexities.

    The first token of a window has no context and is not predicted; the protocol charges it with its window's mean
    (mean times length, summed, divided by windows times length), so the totals here do too.

    Raises:
        NumericError: a mean is NaN or Inf.
    """
    means = list(means)
    for index, value in enumerate(means):
        if not math.isfinite(value):
            raise NumericError(
                f"The model gave {value} for window {index} of the text {windows.name}.",
                "A layer overflowed or is damaged.",
            )
    mean = statistics.fmean(means)
    total = mean * windows.ids.numel()
    spread = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
    return Perplexity(
        token=_exp(mean),
        word=_exp(total / windows.words),
        bits_per_byte=total / math.log(2) / windows.utf8_bytes,
        stderr=None if spread is None else _exp(mean) * spread,  # delta method: d exp(x) = exp(x) dx
        tokens=len(windows) * (windows.length - 1),
        window=windows.length,
        window_nll=means,
    )


def _exp(value: float) -> float:
    """Return exp without overflow: a word of a hopeless model can cost more than 709 nats."""
    return math.exp(min(value, 700.0))
