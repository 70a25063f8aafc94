"""Calibration text becomes tokens in pieces, and the same ones as all at once; of plenty only a part is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from qtoolkit import data, source
from qtoolkit.errors import DataError, RequestError
from qtoolkit.recipe import Calibration

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


LINES = "\n".join(f"The line {number} of many, each a little different." for number in range(20_000))


def test_of_plenty_windows_begin_with_a_line_and_little_else_is_tokenized() -> None:
    tokenizer = data.load_tokenizer(source.resolve("tiny"))
    asked: list[int] = []

    def counted(text: str, **options: bool) -> object:
        asked.append(len(text))
        return tokenizer(text, **options)

    for name in ("bos_token_id", "eos_token_id"):
        setattr(counted, name, getattr(tokenizer, name))
    found = data.windows([LINES], counted, 6, 64, seed=3)  # type: ignore[arg-type]
    assert found.shape == (6, 64)
    assert sum(asked) < 20_000  # of a million characters
    numbers = []
    for row in found[:, len(data.start_tokens(tokenizer)) :]:
        text = tokenizer.decode(row)
        numbers.append(int(text.split()[2]))
        assert text == LINES[LINES.index(f"The line {numbers[-1]} of") :][: len(text)]
    sixths = [len(LINES[: LINES.index(f"The line {number} of")]) * 6 // len(LINES) for number in numbers]
    assert all(abs(sixth - i) <= 1 for i, sixth in enumerate(sorted(sixths)))  # a line may begin before its stretch
    assert sixths != sorted(sixths)  # some windows are a trial's: they are of all the text
    assert torch.equal(found, data.windows([LINES], tokenizer, 6, 64, seed=3))
    assert not torch.equal(found, data.windows([LINES], tokenizer, 6, 64, seed=4))


def test_windows_of_plenty_seldom_repeat() -> None:
    tokenizer = data.load_tokenizer(source.resolve("tiny"))
    text = "\n".join((f"{number} word " * 40)[:300] for number in range(2500))
    found = data.windows([text], tokenizer, 128, 64, seed=0)
    assert len({tuple(row) for row in found.tolist()}) >= 126


@pytest.mark.parametrize("place", [0, 1, 50, 777, 900_000])
def test_tokens_of_a_place_are_those_of_the_whole_from_its_line_on(place: int) -> None:
    tokenizer = data.load_tokenizer(source.resolve("tiny"))
    begin = LINES.rfind("\n", 0, place) + 1
    whole = tokenizer(LINES[begin : begin + 5000], add_special_tokens=False)["input_ids"]
    for wanted in (1, 40, 200):
        assert data._tokens_from(LINES, place, wanted, tokenizer).tolist() == whole[:wanted]


def test_where_the_text_ends_its_last_tokens_are_taken() -> None:
    tokenizer = data.load_tokenizer(source.resolve("tiny"))
    for wanted in (30, 500):
        found = data._tokens_from(LINES, len(LINES) - 1, wanted, tokenizer)
        assert len(found) == wanted
        assert LINES.endswith(tokenizer.decode(found))
    words = "".join(f" word{number}" for number in range(20_000))  # without a line's end
    found = data._tokens_from(words, 70_000, 40, tokenizer)
    assert tokenizer.decode(found).startswith("word")
    assert tokenizer.decode(found) in words[70_000:71_000]
    assert data.windows([words], tokenizer, 2, 64, seed=0).shape == (2, 64)


def test_a_window_without_room_for_text_is_refused() -> None:
    tokenizer = data.load_tokenizer(source.resolve("tiny"))
    with pytest.raises(RequestError, match="no room"):
        data.windows([LINES], tokenizer, 2, len(data.start_tokens(tokenizer)), seed=0)


def test_random_tokens_are_all_as_likely_but_for_special_and_added_ones() -> None:
    tokenizer = data.load_tokenizer(source.resolve("tiny"))
    tokenizer.add_tokens(["<added>"])
    length, vocabulary = 1 << 17, 4000  # the last ones have no row in the embedding
    found = data.random_tokens(tokenizer, vocabulary, 2, length, seed=3)
    assert found[:, 0].tolist() == [tokenizer.bos_token_id] * 2
    left_out = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    assert tokenizer.convert_tokens_to_ids("<added>") in left_out
    seen = found[:, 1:].flatten().bincount(minlength=vocabulary)
    wanted = torch.tensor([index not in left_out for index in range(vocabulary)])
    assert len(seen) == vocabulary
    assert not seen[~wanted].any()
    mean = 2 * (length - 1) / int(wanted.sum())
    assert ((seen[wanted] - mean).abs() < 6 * mean**0.5).all()
    assert torch.equal(found, data.random_tokens(tokenizer, vocabulary, 2, length, seed=3))
    assert not torch.equal(found, data.random_tokens(tokenizer, vocabulary, 2, length, seed=4))


def test_a_tokenizer_that_tells_of_no_added_tokens_will_do_and_one_of_nothing_else_gives_none() -> None:
    class Odd:
        bos_token_id = None
        all_special_ids = (0,)

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [1]}

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 1, "c": 7}

        def added_tokens_decoder(self) -> None:
            """As in Mistral's own tokenizers, where this is not implemented."""

    odd: Any = Odd()
    assert data.random_tokens(odd, 4, 3, 5, seed=0).tolist() == [[1] * 5] * 3
    assert data.random_tokens(odd, 1, 3, 5, seed=0).shape == (0, 5)


@pytest.mark.parametrize(
    ("samples", "share", "text", "random"),
    [(64, 0.125, 56, 8), (64, 0.0, 64, 0), (7, 0.125, 7, 0), (9, 0.3, 7, 2), (500, 0.125, 70, 10), (2, 0.99, 1, 1)],
)
def test_a_share_of_the_windows_is_random_also_where_the_text_is_short(
    samples: int, share: float, text: int, random: int, tmp_path: Path
) -> None:
    """The text has 70 windows of 64 tokens and a few more."""
    model, tokenizer = source.resolve("tiny"), data.load_tokenizer(source.resolve("tiny"))
    ids = data.encoded(LINES, tokenizer)[: 63 * 70 + 20]
    file = tmp_path / "text.txt"
    file.write_text(tokenizer.decode(ids))
    assert len(data.encoded(file.read_text(), tokenizer)) // 63 == 70
    wanted = Calibration(data=str(file), samples=samples, length=64, random=share)
    said: list[str] = []
    found = data.calibration_tokens(model, wanted, 256, 4096, said.append)
    assert [each.shape for each in found] == [(text, 64), (random, 64)]
    assert said == (
        [f"the text gives {text} windows of 64 tokens, with {random} of random tokens beside them"]
        if text + random < samples
        else []
    )
    less = wanted.model_copy(update={"samples": samples - int(samples * share)})
    assert torch.equal(found[0], data.text_tokens(model, less, 256, str, data.CPU))


def test_long_text_of_too_few_tokens_is_refused() -> None:
    class Coarse:
        bos_token_id = None

        def __call__(self, text: str, **_: bool) -> dict[str, list[int]]:
            return {"input_ids": [1] * (len(text) // 1000)}

    with pytest.raises(DataError, match="has 20 tokens, but one window takes 100"):
        data.windows(["word " * 4000], Coarse(), 1, 100, seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(("large", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_model_that_writes_holds_no_more_keys_and_values_than_it_may(
    large: bool, dtype: torch.dtype, random_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers of two heads of 32, keys and values: 256 numbers a token; a large model keeps its own dtype."""
    length, together = 12, 2
    monkeypatch.setattr(data, "LARGE", 1 if large else 1 << 60)
    monkeypatch.setattr(data, "CACHE", together * length * 256 * dtype.itemsize + 1)
    wide: list[int] = []
    forward = LlamaForCausalLM.forward

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert self.dtype == dtype
        out = forward(self, *args, **kwargs)
        layers = out.past_key_values.layers
        wide.append(sum(each.nbytes for layer in layers for each in (layer.keys, layer.values)))
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", watched)
    said: list[str] = []
    wanted = Calibration(data="self", samples=5, length=length, seed=0)
    text, random = data.calibration_tokens(source.resolve(random_llama), wanted, 256, 4096, said.append)
    assert (len(text), len(random)) == (5, 0)
    assert len(wide) == 3 * (length - 1)  # two, two and one sequence
    assert max(wide) <= data.CACHE
    assert any("--data" in line for line in said) == large


def test_half_a_character_is_replaced_and_a_byte_order_mark_is_none(tmp_path: Path) -> None:
    tokenizer = data.load_tokenizer(source.resolve("tiny"))
    lines = tmp_path / "lines.jsonl"
    rows = [{"text": "a \ud800 x"}, {"messages": [{"role": "user", "content": "\udfff"}]}, {"text": "\U0001f600"}]
    lines.write_text("\n".join(map(json.dumps, rows)), "utf-8-sig")
    first, second, third = data.documents(str(lines), tokenizer)
    assert (first, third) == ("a \ufffd x", "\U0001f600")
    assert "\ufffd" in second
    assert len(data.windows([first, second], tokenizer, 1, 4, 0)) == 1
    (tmp_path / "text.txt").write_text("a b", "utf-8-sig")
    assert data.documents(str(tmp_path / "text.txt")) == ["a b"]


def test_content_in_parts_is_their_text_joined(tmp_path: Path) -> None:
    tokenizer = data.load_tokenizer(source.resolve("tiny"))
    whole = [{"role": "user", "content": "one, two"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "one, "}, {"type": "text", "text": "two"}]}]
    lines = tmp_path / "lines.jsonl"
    lines.write_text("\n".join(json.dumps({"messages": messages}) for messages in (whole, parts)))
    for one in (tokenizer, None):
        first, second = data.documents(str(lines), one)
        assert first == second
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    lines.write_text(json.dumps({"messages": picture}))
    with pytest.raises(DataError, match=r"line 1: a part of a message has no text\."):
        data.documents(str(lines), tokenizer)


def test_text_in_another_encoding_is_told_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(DataError, match="cannot be read as UTF-8") as caught:
        data.documents(str(tmp_path / "text.txt"))
    assert caught.value.hint == "Save it as UTF-8."


def test_a_name_of_calibration_text_is_checked_without_reading_it(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a")
    for name in ("self", "c4", "org/name:en:train", str(tmp_path / "text.txt")):
        data.check(name)
    for name in ("nothere.txt", "./nothere.txt", "c5"):
        with pytest.raises(RequestError, match="no such file or data set"):
            data.check(name)
