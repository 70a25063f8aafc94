"""A streaming client of a completions endpoint that notes when tokens arrive: what serving benchmarks measure with."""

from __future__ import annotations

import http.client
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlsplit

from qtoolkit.errors import ServeError

TIMEOUT = 1200.0  # seconds; a long prompt on two cores takes its time


@dataclass(frozen=True)
class Arrival:
    """When one request was sent, and when its first token and its end came (seconds of one clock), and its tokens."""

    sent: float
    first: float
    end: float
    tokens: int


@dataclass(frozen=True)
class Client:
    """An endpoint (``http://host:port/v1``), the name it serves a model under, and the tokens prompts are made of."""

    url: str
    model: str
    vocabulary: int

    def ask(self, prompt: list[int], tokens: int) -> Arrival:
        """Stream exactly ``tokens`` greedy tokens after ``prompt``.

        Raises:
            ServeError: the server does not answer with a stream of tokens.
        """
        parts = urlsplit(self.url)
        body = {
            "model": self.model, "prompt": prompt, "max_tokens": tokens, "min_tokens": tokens, "ignore_eos": True,
            "temperature": 0, "stream": True,
        }  # fmt: skip
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=TIMEOUT)
        sent = time.perf_counter()
        try:
            connection.request(
                "POST", f"{parts.path}/completions", json.dumps(body), {"Content-Type": "application/json"}
            )
            answer = connection.getresponse()
            if answer.status != 200:
                raise ServeError(f"{self.url} answered {answer.status}: {answer.read(300)!r}.")
            first = 0.0
            for line in answer:
                if line.startswith(b"data: {") and not first:
                    first = time.perf_counter()
        except OSError as error:
            raise ServeError(f"{self.url} broke off: {error}.") from error
        finally:
            connection.close()
        if not first:
            raise ServeError(f"{self.url} sent no token.")
        return Arrival(sent, first, time.perf_counter(), tokens)

    def together(self, count: int, prompt: int, tokens: int, seed: int) -> list[Arrival]:
        """Send ``count`` requests at once, each with its own random prompt of ``prompt`` tokens."""
        source = random.Random(seed)
        prompts = [[source.randrange(3, self.vocabulary) for _ in range(prompt)] for _ in range(count)]
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(lambda own: self.ask(own, tokens), prompts))


def decode_rate(arrivals: list[Arrival]) -> float:
    """Return tokens a second of all requests together, from the first token of any to the last of all."""
    seconds = max(a.end for a in arrivals) - min(a.first for a in arrivals)
    return sum(a.tokens - 1 for a in arrivals) / seconds
