"""Cuts a text into the token windows that every score here is measured on, so that any two models see the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qtoolkit.errors import DataError, RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROTOCOL_LENGTH = 2048  # tokens; what GPTQ, AWQ and QQQ publish their perplexities with
SHORTEST = 8  # tokens; below this a window says nothing about a language model


@dataclass(frozen=True)
class Windows:
    """Consecutive, non-overlapping pieces of one text.

    Attributes:
        name: the text's name.
        ids: int64 [windows, length] token ids; what is left over at the end of the text is not in it.
        words: whitespace-separated words of the text that the windows cover.
        utf8_bytes: its size in bytes.
    """

    name: str
    ids: Tensor
    words: int
    utf8_bytes: int

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        """Return the tokens of one window."""
        return self.ids.shape[1]


def window_length(config: Any, asked: int | None = None) -> int:
    """Return the tokens of one window: what was asked for, or 2048, or the model's context where that is shorter.

    Raises:
        RequestError: the length asked for is tiny or longer than the model's context.
    """
    context = getattr(config, "max_position_embeddings", None) or PROTOCOL_LENGTH
    if asked is None:
        return min(PROTOCOL_LENGTH, context)
    if not SHORTEST <= asked <= context:
        raise RequestError(
            f"A window of {asked} tokens does not fit: the model's context is {context}.",
            f"Choose --window between {SHORTEST} and {context}.",
        )
    return asked


def cut(name: str, text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Windows:
    """Tokenize ``text`` once as a whole and cut it into windows of ``length`` tokens.

    The tokenizer adds its start token where it is made to, once, in front of the first window: this is how the
    published figures were taken.

    Raises:
        DataError: the text is empty or shorter than one window.
    """
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]  # [tokens]
    count = len(ids) // length
    if count == 0:
        raise DataError(
            f"The text {name} has {len(ids)} tokens, but one window takes {length}.",
            "Give a longer text, or a smaller --window.",
        )
    covered = ids[: count * length]
    # Without cleaning up: it would glue words together and change their number.
    seen = str(tokenizer.decode(covered, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    windows = covered.to(torch.int64).view(count, length)
    return Windows(name, windows, words=len(seen.split()), utf8_bytes=len(seen.encode()))
