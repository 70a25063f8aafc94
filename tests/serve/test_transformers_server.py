"""The fallback where vLLM is missing: the same command and the same line, W4A8 through our own runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from serving_support import PROMPT, Served, Start, own_greedy
from transformers import AutoTokenizer

from qtoolkit import runtime

ASK: dict[str, Any] = {"model": "random-w4a8", "max_tokens": 12, "temperature": 0}
MESSAGES: list[Any] = [{"role": "user", "content": "Tell me a story."}]


@pytest.fixture(scope="module")
def fallback(start: Start, packed: Path) -> Iterator[Served]:
    with start(packed, ["--engine", "transformers"]) as served:
        yield served


def test_the_ready_line_names_url_model_and_kernels(fallback: Served) -> None:
    assert list(fallback.ready) == ["ok", "url", "model", "kernels"]
    ours = {name: count for name, count in fallback.ready["kernels"].items() if name.startswith("w4a8-")}
    assert sum(ours.values()) == 14  # two blocks of seven layers, not fused
    assert [model.id for model in fallback.client().models.list()] == ["random-w4a8"]


def test_a_completion_is_what_our_runtime_says(fallback: Served, packed: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(packed)
    expected = own_greedy(runtime.load(packed), tokenizer(PROMPT)["input_ids"], 12)
    text = fallback.client().completions.create(**ASK, prompt=PROMPT).choices[0].text
    assert text == tokenizer.decode(expected, skip_special_tokens=True)


def test_a_chat_answers_and_streams(fallback: Served) -> None:
    chat = fallback.client().chat.completions
    whole = chat.create(**ASK, messages=MESSAGES).choices[0].message.content
    parts = [chunk.choices[0].delta.content or "" for chunk in chat.create(**ASK, messages=MESSAGES, stream=True)]
    assert whole
    assert whole.startswith("".join(parts)[:4])


@pytest.mark.parametrize(
    ("request_", "error"),
    [({"prompt": PROMPT * 50}, "context is 512 tokens"), ({"prompt": PROMPT, "model": "other"}, "pinned")],
)
def test_what_cannot_be_answered_is_a_4xx(fallback: Served, request_: dict[str, Any], error: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        fallback.client().completions.create(**{**ASK, **request_})
    assert error in caught.value.response.text


def test_a_wrong_key_is_refused(fallback: Served) -> None:
    with pytest.raises(openai.AuthenticationError):
        fallback.client("sk-wrong").models.list()


@pytest.mark.parametrize("route", ["/load_model", "/reset"])
def test_a_client_cannot_load_or_drop_models(fallback: Served, route: str) -> None:
    answer = fallback.client().with_options(base_url=fallback.ready["url"].removesuffix("/v1"))
    with pytest.raises(openai.NotFoundError):
        answer.post(route, cast_to=object, body={})
