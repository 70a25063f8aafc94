"""Calibration text becomes tokens in pieces, and the same ones as all at once; of plenty only a part is read."""

from __future__ import annotations

import pytest
import torch

from qtoolkit import data, source
from qtoolkit.errors import DataError

TEXT = "One line.\nAnother, with a list:\n\n  - a\n  - b\n\n\n\n= Heading =\n\r\nThe end of it \n\n and more\n" * 40


@pytest.mark.parametrize("piece", [1, 7, 100, 1 << 18])
def test_pieces_give_the_tokens_of_the_whole(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = data.load_tokenizer(source.resolve("tiny"))
    whole = tokenizer(TEXT + "\n\n" + TEXT, add_special_tokens=False, verbose=False)["input_ids"]
    monkeypatch.setattr(data, "PIECE", piece)
    found = data.encoded(TEXT + "\n\n" + TEXT, tokenizer)
    assert found.dtype == torch.int32
    assert found.tolist() == whole


def test_text_without_lines_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = data.load_tokenizer(source.resolve("tiny"))
    monkeypatch.setattr(data, "PIECE", 10)
    text = "word " * 100
    assert data.encoded(text, tokenizer).tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_of_plenty_windows_begin_with_a_line_and_little_else_is_tokenized() -> None:
    tokenizer = data.load_tokenizer(source.resolve("tiny"))
    lines = [f"The line {number} of many, each a little different." for number in range(20_000)]
    asked: list[int] = []

    def counted(text: str, **options: bool) -> object:
        asked.append(len(text))
        return tokenizer(text, **options)

    for name in ("bos_token_id", "eos_token_id"):
        setattr(counted, name, getattr(tokenizer, name))
    found = data.windows(["\n".join(lines)], counted, 6, 64, seed=3)  # type: ignore[arg-type]
    assert found.shape == (6, 64)
    assert sum(asked) < 20_000  # of a million characters
    start = len(data.start_tokens(tokenizer))
    for row in found[:, start:]:
        text = tokenizer.decode(row)
        number = int(text.split()[2])
        assert text == "\n".join(lines[number : number + 9])[: len(text)]
    assert len({tuple(row) for row in found.tolist()}) == 6
    assert torch.equal(found, data.windows(["\n".join(lines)], tokenizer, 6, 64, seed=3))
    assert not torch.equal(found, data.windows(["\n".join(lines)], tokenizer, 6, 64, seed=4))


def test_windows_of_plenty_reach_back_where_the_text_ends_or_has_no_lines() -> None:
    tokenizer = data.load_tokenizer(source.resolve("tiny"))
    text = "".join(f" {number}" for number in range(20_000))
    for size in (64, 512):
        found = data.windows([text], tokenizer, 2, size, seed=size)
        assert found.shape == (2, size)
    behind = data._tokens_behind(text, len(text) - 1, 40, tokenizer)
    assert len(behind) == 40
    assert tokenizer.decode(behind) in text


def test_long_text_of_too_few_tokens_is_refused() -> None:
    class Coarse:
        bos_token_id = None

        def __call__(self, text: str, **_: bool) -> dict[str, list[int]]:
            return {"input_ids": [1] * (len(text) // 1000)}

    with pytest.raises(DataError, match="has 20 tokens, but one window takes 100"):
        data.windows(["word " * 4000], Coarse(), 1, 100, seed=0)  # type: ignore[arg-type]
