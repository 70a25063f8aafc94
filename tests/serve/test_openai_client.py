"""What a user of the real `openai` client sees of a served checkpoint."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import torch
from serving_support import PROMPT, Served, own_logprobs

from qtoolkit import runtime

MESSAGES: list[Any] = [{"role": "user", "content": "Tell me a story."}]


def test_the_ready_line_names_url_model_and_kernels(server: Served) -> None:
    assert list(server.ready) == ["ok", "url", "model", "kernels"]
    assert server.ready["ok"] is True
    assert server.ready["model"] == "random-w4a8"
    kernels = server.ready["kernels"]
    ours = {name: count for name, count in kernels.items() if name.startswith("w4a8-")}
    assert sum(ours.values()) == 8  # two blocks of qkv, o, gate and up, down
    assert kernels.get("unquantized") == 1  # lm_head


def test_the_start_up_line_says_why_a_layer_is_not_w4a8(server: Served) -> None:
    line = server.start_up_line()
    assert line.startswith("of 9 linear layers 8 on w4a8-")
    assert "not W4A8: lm_head: it is not quantized in the checkpoint" in line


def test_models_lists_the_served_name(server: Served) -> None:
    assert [model.id for model in server.client().models.list()] == ["random-w4a8"]


def test_a_completion_has_text_and_usage(server: Served) -> None:
    answer = server.client().completions.create(model="random-w4a8", prompt=PROMPT, max_tokens=8, temperature=0)
    assert answer.usage.completion_tokens == 8
    assert answer.choices[0].finish_reason == "length"


def test_a_chat_answers_and_streams_the_same_text(server: Served) -> None:
    ask = {"model": "random-w4a8", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = server.client().chat.completions.create(**ask).choices[0].message.content
    parts = [
        chunk.choices[0].delta.content or "" for chunk in server.client().chat.completions.create(**ask, stream=True)
    ]
    assert "".join(parts) == whole
    assert len(parts) > 2


def test_logprobs_come_with_their_tokens(server: Served) -> None:
    answer = server.client().completions.create(
        model="random-w4a8", prompt=PROMPT, max_tokens=4, temperature=0, logprobs=3
    )
    probabilities = answer.choices[0].logprobs
    assert len(probabilities.token_logprobs) == 4
    for value, alternatives in zip(probabilities.token_logprobs, probabilities.top_logprobs, strict=True):
        assert value == pytest.approx(max(alternatives.values()))  # greedy takes the likeliest


def test_a_stop_string_ends_the_text(server: Served) -> None:
    ask = {"model": "random-w4a8", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    text = server.client().completions.create(**ask).choices[0].text
    end = text[4:6]
    stopped = server.client().completions.create(**ask, stop=[end]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == text[: text.index(end)]


def test_32_concurrent_requests_are_all_answered(server: Served) -> None:
    client = server.client()

    def ask(number: int) -> int:
        answer = client.completions.create(
            model="random-w4a8", prompt=f"{number}: {PROMPT}", max_tokens=8, temperature=0
        )
        return answer.usage.completion_tokens

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(ask, range(32))) == [8] * 32


def test_a_wrong_key_is_refused(server: Served) -> None:
    with pytest.raises(openai.AuthenticationError):
        server.client("sk-wrong").models.list()


def test_an_over_long_prompt_is_refused(server: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="512"):
        server.client().completions.create(model="random-w4a8", prompt=PROMPT * 50, max_tokens=1)


def test_the_key_is_in_no_command_line(server: Served) -> None:
    for process in server.family():
        assert "sk-test" not in " ".join(process.cmdline())


def test_the_server_listens_on_the_loopback_address_only(server: Served) -> None:
    port = int(server.ready["url"].rpartition(":")[2].removesuffix("/v1"))
    addresses = {
        connection.laddr.ip
        for process in server.family()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }
    assert addresses == {"127.0.0.1"}


def test_served_logprobs_are_those_of_our_own_runtime(server: Served, packed: Path, tokens: list[int]) -> None:
    served = server.prompt_logprobs(tokens)
    same = runtime.load(packed, dtype=torch.float32)
    floating = runtime.load(packed, dtype=torch.float32, activations=False)
    difference = (served - own_logprobs(same, tokens)).abs().mean()
    noise = (served - own_logprobs(floating, tokens)).abs().mean()
    # Both compute in float32; what is left are activations that round to the other int8 neighbour.
    assert difference < 0.2 * noise, f"mean difference {difference:.2e}, to float activations {noise:.2e}"
