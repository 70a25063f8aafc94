"""Calibration text becomes tokens in pieces, and the same ones as all at once."""

from __future__ import annotations

import pytest
import torch

from qtoolkit import data, source

TEXT = "One line.\nAnother, with a list:\n\n  - a\n  - b\n\n\n\n= Heading =\n\r\nThe end of it \n\n and more\n" * 40


@pytest.mark.parametrize("piece", [1, 7, 100, 1 << 18])
def test_pieces_give_the_tokens_of_the_whole(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = data.load_tokenizer(source.resolve("tiny"))
    whole = tokenizer(TEXT + "\n\n" + TEXT, add_special_tokens=False, verbose=False)["input_ids"]
    monkeypatch.setattr(data, "PIECE", piece)
    found = data.encoded([TEXT, TEXT], tokenizer)
    assert found.dtype == torch.int32
    assert found.tolist() == whole


def test_text_without_lines_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = data.load_tokenizer(source.resolve("tiny"))
    monkeypatch.setattr(data, "PIECE", 10)
    text = "word " * 100
    assert data.encoded([text], tokenizer).tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
