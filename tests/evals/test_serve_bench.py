"""The serving benchmark measures what a server does, keeps the documented names, and stops what it started."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from qtoolkit.errors import ServeError
from qtoolkit.evals import serve_bench
from qtoolkit.evals.serve_client import Arrival, Client, decode_rate

NAMES = {
    "prefill512_tok_s", "prefill1024_tok_s", "decode1_tok_s", "decode4_tok_s", "decode16_tok_s", "ttft_ms",
    "load32_tok_s", "load32_ttft_ms", "peak_rss_bytes",
}  # fmt: skip


class Streams(BaseHTTPRequestHandler):
    """Answers completions with one event a token, the first after a fixed wait."""

    wait = 0.02
    seen: list[dict[str, Any]]

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).seen.append(asked)
        self.send_response(200 if asked["model"] == "known" else 404)
        self.end_headers()
        time.sleep(self.wait)
        for _ in range(asked["max_tokens"]):
            self.wfile.write(b'data: {"choices": []}\n\n')
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    Streams.seen = []
    running = ThreadingHTTPServer(("127.0.0.1", 0), Streams)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/v1"
    running.shutdown()


def test_measurements_have_the_documented_names_and_order(server: str) -> None:
    row = serve_bench.measure(Client(server, "known", 100))
    assert set(row) == NAMES
    assert row["ttft_ms"] >= 1000 * Streams.wait
    assert row["prefill512_tok_s"] <= 512 / Streams.wait
    assert row["prefill1024_tok_s"] <= 1024 / Streams.wait
    lengths = {len(asked["prompt"]) for asked in Streams.seen}
    assert {512, 1024} <= lengths
    assert all(3 <= token < 100 for asked in Streams.seen for token in asked["prompt"])
    assert all(asked["ignore_eos"] and asked["stream"] for asked in Streams.seen)


def test_prompts_differ_so_that_no_prefix_cache_answers(server: str) -> None:
    Client(server, "known", 30000).together(4, 64, 2, seed=1)
    assert len({tuple(asked["prompt"]) for asked in Streams.seen}) == 4


def test_a_server_that_refuses_is_quoted(server: str) -> None:
    with pytest.raises(ServeError, match="answered 404"):
        Client(server, "unknown", 100).ask([1], 1)


def test_decode_rate_counts_the_tokens_after_each_first() -> None:
    arrivals = [Arrival(0.0, 1.0, 3.0, 11), Arrival(0.0, 1.5, 6.0, 11)]
    assert decode_rate(arrivals) == 20 / 5


def test_rounds_take_turns_and_medians_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    values = iter([1.0, 10.0, 3.0, 30.0, 2.0, 20.0])

    def fake(entry: serve_bench.Contestant, extra: tuple[str, ...], say: Any) -> dict[str, float]:
        order.append(entry.name)
        return {"decode1_tok_s": next(values)}

    monkeypatch.setattr(serve_bench, "_serve_and_measure", fake)
    entries = tuple(serve_bench.Contestant(name, Path()) for name in ("a", "b"))
    assert serve_bench.run(entries, rounds=3) == {
        "rows": [{"name": "a", "decode1_tok_s": 2.0, "rounds": 3}, {"name": "b", "decode1_tok_s": 20.0, "rounds": 3}]
    }
    assert order == ["a", "b"] * 3


def test_ours_and_stock_serve_the_same_folder_by_environment() -> None:
    entries = {entry.name: entry for entry in serve_bench.contestants(Path("a"), Path("b"), Path("c"))}
    assert entries["qtoolkit-w4a8"].folder == entries["vllm-w4a16"].folder == Path("c")
    assert entries["qtoolkit-w4a8"].environment == {"QTOOLKIT_W4A8": "always"}
    assert set(entries) == {"qtoolkit-w4a8", "vllm-w4a16", "vllm-w8a8", "vllm-bf16"}


def test_a_servers_environment_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLD", "1")
    with serve_bench._environment({"OLD": "2", "NEW": "3"}):
        assert (os.environ["OLD"], os.environ["NEW"]) == ("2", "3")
    assert os.environ["OLD"] == "1"
    assert "NEW" not in os.environ
