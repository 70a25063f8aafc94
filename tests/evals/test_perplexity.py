"""Perplexity against slow formulations written out here, and the window protocol at its edges."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtoolkit.errors import DataError, ModelError, NumericError, RequestError
from qtoolkit.evals import perplexity, texts
from qtoolkit.evals.windows import Windows, cut, window_length


def slow_nll(model: Any, ids: list[int]) -> float:
    """Predict token after token, each from all before it in the window; sum the surprise."""
    total = 0.0
    for place in range(1, len(ids)):
        with torch.no_grad():
            last = model(input_ids=torch.tensor([ids[:place]])).logits[0, -1].double()
        total -= (last - last.logsumexp(0))[ids[place]].item()
    return total


def test_perplexity_is_that_of_predicting_token_after_token(model: Any, tokenizer: Any, text: str) -> None:
    windows = cut("foxes", text[:80], tokenizer, 24)
    assert windows.ids.shape == (3, 24)
    found = perplexity.of_model(model, windows)
    mean = sum(slow_nll(model, ids.tolist()) for ids in windows.ids) / (3 * 23)
    assert found.token == pytest.approx(math.exp(mean), rel=1e-4)  # float32 logits of two orders of summing
    assert found.tokens == 3 * 23


def test_perplexity_of_a_trained_model_is_that_of_predicting_token_after_token(shared_data: Path) -> None:
    folder = shared_data / "models" / "stories260k-hf"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    story = "Once upon a time there was a little girl named Lily. She loved to play outside in the park. " * 2
    windows = cut("story", story, AutoTokenizer.from_pretrained(folder), 32)
    found = perplexity.of_model(model, windows)
    mean = sum(slow_nll(model, ids.tolist()) for ids in windows.ids) / (len(windows) * 31)
    assert found.token == pytest.approx(math.exp(mean), rel=1e-4)
    assert found.token < 6  # a story such as it was trained on; 512 would be a guess


def test_word_perplexity_and_bits_per_byte_share_the_total(model: Any, tokenizer: Any, text: str) -> None:
    windows = cut("foxes", text[:129], tokenizer, 65)  # with <s> two windows of 65: 129 characters seen
    found = perplexity.of_model(model, windows)
    total = math.log(found.token) * 130
    assert windows.words == len(text[:129].split())
    assert math.log(found.word) == pytest.approx(total / windows.words)
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / 129)


def test_standard_error_is_that_of_the_windows() -> None:
    windows = Windows("x", torch.zeros(4, 8, dtype=torch.int64), words=10, utf8_bytes=40)
    found = perplexity.summarize(windows, [1.0, 2.0, 3.0, 4.0])
    assert found.token == pytest.approx(math.exp(2.5))
    assert found.stderr == pytest.approx(math.exp(2.5) * math.sqrt(5 / 3) / 2)  # deviation of 1..4 over root 4
    one = Windows("x", torch.zeros(1, 8, dtype=torch.int64), words=10, utf8_bytes=40)
    assert perplexity.summarize(one, [1.0]).stderr is None


def test_windows_do_not_overlap_and_the_rest_is_left_out(tokenizer: Any) -> None:
    windows = cut("abc", "abcdefghij", tokenizer, 4)  # <s> and 10 bytes: two windows, three tokens left
    assert tokenizer.decode(windows.ids.flatten()) == "<s>abcdefg"
    assert windows.words == 1
    assert windows.utf8_bytes == 7


def test_window_is_2048_or_the_models_context() -> None:
    assert window_length(SimpleNamespace(max_position_embeddings=131072)) == 2048
    assert window_length(SimpleNamespace(max_position_embeddings=512)) == 512
    assert window_length(SimpleNamespace(max_position_embeddings=512), 128) == 128


@pytest.mark.parametrize("asked", [0, -1, 7, 513])
def test_window_that_does_not_fit_is_refused(asked: int) -> None:
    with pytest.raises(RequestError, match="512"):
        window_length(SimpleNamespace(max_position_embeddings=512), asked)


@pytest.mark.parametrize("text", ["", "too short"])
def test_text_shorter_than_a_window_is_refused_with_both_lengths(tokenizer: Any, text: str) -> None:
    with pytest.raises(DataError, match=f"{len(text) + 1} tokens, but one window takes 64"):
        cut("short", text, tokenizer, 64)


def test_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n", "utf-8")
    with pytest.raises(DataError, match="no text"):
        texts.load(str(tmp_path / "empty.txt"))


def test_unknown_text_names_the_nearest() -> None:
    with pytest.raises(RequestError, match="sample"):
        texts.load("sampel")


def test_file_is_named_by_its_stem_and_read_as_it_is(text_file: Path, text: str) -> None:
    loaded = texts.load(str(text_file))
    assert (loaded.name, loaded.text) == ("foxes", text)


def test_built_in_text_is_there_with_its_licence() -> None:
    sample = texts.load("sample")
    assert 9_000 < len(sample.text.split()) < 12_000
    assert "<unk>" not in sample.text
    assert "CC BY-SA 3.0" in (Path(texts.__file__).parent / "README.md").read_text("utf-8")


def test_ids_outside_the_vocabulary_are_a_model_error(model: Any) -> None:
    with pytest.raises(ModelError, match="300"):
        perplexity.window_nll(model, torch.tensor([1, 300, 2]))


def test_nan_is_named_with_its_window_and_text(model: Any, tokenizer: Any, text: str) -> None:
    def broken(*, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=torch.full((1, input_ids.shape[1], 258), float("nan")))

    broken.config = model.config  # type: ignore[attr-defined]
    with pytest.raises(NumericError, match="window 0 of the text foxes"):
        perplexity.of_model(broken, cut("foxes", text[:130], tokenizer, 64))  # type: ignore[arg-type]
