"""Scores text on a running vLLM server through its OpenAI-compatible completions, window by window."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qtoolkit.errors import RequestError, ServeError
from qtoolkit.evals.perplexity import Perplexity, summarize
from qtoolkit.evals.windows import Windows

TIMEOUT = 600.0  # seconds; a long window on two cores takes its time
KEY_VARIABLE = "OPENAI_API_KEY"


@dataclass(frozen=True)
class Endpoint:
    """A server and one of its models.

    Attributes:
        url: the address up to and without ``/v1``.
        model: the served model's name.
        context: the most tokens a request may have, or None where the server does not say.
    """

    url: str
    model: str
    context: int | None

    def window_nll(self, ids: Tensor) -> float:
        """Return the mean negative log-likelihood, in nats, of ids[1:] given what stands before each; ids is [length].

        A server refuses a prompt as long as its context, so the last token is not sent: its probability is asked for
        as that of the first generated token.
        """
        *prompt, last = ids.tolist()
        answer = _ask(
            f"{self.url}/v1/completions",
            {
                "model": self.model,
                "prompt": prompt,
                "max_tokens": 1,
                "temperature": 0,
                "prompt_logprobs": 0,
                "logprobs": 1,
                "logprob_token_ids": [last],
                "return_tokens_as_token_ids": True,
            },
        )
        try:
            choice = answer["choices"][0]
            seen = [
                row[str(token)]["logprob"] for row, token in zip(choice["prompt_logprobs"][1:], prompt[1:], strict=True)
            ]
            seen.append(choice["logprobs"]["top_logprobs"][0][f"token_id:{last}"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ServeError(
                f"The server at {self.url} gave no log probabilities of the prompt ({error!r}).",
                "Perplexity over HTTP needs vLLM's server, 0.32 or newer.",
            ) from None
        return -sum(seen) / len(seen)

    def perplexity(self, windows: Windows) -> Perplexity:
        """Measure the served model's perplexity on ``windows``.

        Raises:
            RequestError: a window does not fit into the server's context.
            ServeError: the server refused or died.
        """
        if self.context is not None and windows.length > self.context:
            raise RequestError(
                f"A window has {windows.length} tokens, but the server takes at most {self.context}.",
                f"Choose --window {self.context}.",
            )
        return summarize(windows, (self.window_nll(ids) for ids in windows.ids))


def connect(url: str, model: str | None = None) -> Endpoint:
    """Ask the server at ``url`` (with or without ``/v1``) what it serves; its key is taken from OPENAI_API_KEY.

    Raises:
        RequestError: it does not serve ``model``.
        ServeError: nothing answers there, or not as an OpenAI-compatible server.
    """
    base = url.rstrip("/").removesuffix("/v1").rstrip("/")
    listed = _ask(f"{base}/v1/models").get("data")
    if not listed:
        raise ServeError(f"The server at {base} lists no models.", "Is it an OpenAI-compatible server?")
    rows = {row["id"]: row for row in listed}
    name = model or next(iter(rows))
    if name not in rows:
        raise RequestError(f"The server at {base} does not serve {name!r}.", f"It serves {', '.join(rows)}.")
    return Endpoint(base, name, rows[name].get("max_model_len"))


def _ask(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {key}"
    try:
        request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        said = " ".join(error.read().decode(errors="replace").split())[:300]
        hint = f"Set {KEY_VARIABLE} to the server's key." if error.code == 401 else ""
        raise ServeError(f"The server answered {error.code} to {url}: {said}", hint) from None
    except (OSError, ValueError) as error:  # refused, timed out, not an address, not JSON
        raise ServeError(
            f"No answer from {url}: {error}.", "Is the server running? Give its address: http://host:port"
        ) from None
