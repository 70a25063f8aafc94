"""Perplexity over HTTP: the same windows give the same figure; what a server may answer wrongly is an error."""

from __future__ import annotations

from typing import Any

import pytest

from qtoolkit.errors import RequestError, ServeError
from qtoolkit.evals import endpoint, perplexity
from qtoolkit.evals.windows import cut


def test_served_perplexity_is_the_runtimes(server: Any, model: Any, tokenizer: Any, text: str) -> None:
    url, state = server
    windows = cut("foxes", text[:1100], tokenizer, 256)  # as long as the server's whole context
    there = endpoint.connect(url).perplexity(windows)
    here = perplexity.of_model(model, windows)
    assert there.token == pytest.approx(here.token, rel=1e-5)
    assert there.window_nll == pytest.approx(here.window_nll, rel=1e-5)
    assert state.requests == len(windows) == 4


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_address_may_end_in_v1(server: Any, ending: str) -> None:
    url, _ = server
    found = endpoint.connect(url + ending)
    assert (found.url, found.model, found.context) == (url, "served", 256)


def test_windows_longer_than_the_servers_context_are_refused(server: Any, tokenizer: Any, text: str) -> None:
    with pytest.raises(RequestError, match="300 tokens, but the server takes at most 256"):
        endpoint.connect(server[0]).perplexity(cut("foxes", text, tokenizer, 300))


def test_nobody_there_is_a_serve_error() -> None:
    with pytest.raises(ServeError, match="No answer"):
        endpoint.connect("http://127.0.0.1:9")


def test_not_an_address_is_a_serve_error() -> None:
    with pytest.raises(ServeError, match="No answer"):
        endpoint.connect("localhost")


def test_model_that_is_not_served_is_refused_with_those_that_are(server: Any) -> None:
    with pytest.raises(RequestError, match="served"):
        endpoint.connect(server[0], "another")


def test_key_comes_from_the_environment(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url, state = server
    state.key = "secret"
    monkeypatch.delenv(endpoint.KEY_VARIABLE, raising=False)
    with pytest.raises(ServeError, match="401") as raised:
        endpoint.connect(url)
    assert endpoint.KEY_VARIABLE in raised.value.hint
    monkeypatch.setenv(endpoint.KEY_VARIABLE, "secret")
    assert endpoint.connect(url).model == "served"


def test_server_without_prompt_log_probabilities_is_named(server: Any, tokenizer: Any, text: str) -> None:
    url, state = server
    state.complete = lambda body: {"choices": [{"text": "hello"}]}
    with pytest.raises(ServeError, match="no log probabilities"):
        endpoint.connect(url).perplexity(cut("foxes", text, tokenizer, 64))
