"""The serving benchmark measures what a server does, keeps the documented names, and stops what it started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qtoolkit.cli import app
from qtoolkit.errors import RequestError, ServeError
from qtoolkit.evals import serve_bench
from qtoolkit.evals.serve_client import Arrival, Client, decode_rate

NAMES = {
    "prefill512_tok_s", "prefill1024_tok_s", "decode1_tok_s", "decode4_tok_s", "decode16_tok_s", "ttft_ms",
    "load32_tok_s", "load32_ttft_ms",
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


class Server(ThreadingHTTPServer):
    request_queue_size = 64  # 32 clients come at once; the default of 5 resets some of them on a busy machine


@pytest.fixture
def server() -> Iterator[str]:
    Streams.seen = []
    running = Server(("127.0.0.1", 0), Streams)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/v1"
    running.shutdown()


def test_measurements_have_the_documented_names_and_order(server: str) -> None:
    running = [serve_bench.Running(name, Client(server, "known", 100), os.getpid()) for name in ("a", "b")]
    seen = serve_bench.measure(running, rounds=2)
    for runs in seen.values():
        assert set(runs) == NAMES
        assert {key: len(values) for key, values in runs.items() if not key.startswith("load")} == dict.fromkeys(
            (key for key in NAMES if not key.startswith("load")), 2
        )
        assert min(runs["ttft_ms"]) >= 1000 * Streams.wait
        assert max(runs["prefill512_tok_s"]) <= 512 / Streams.wait
    assert all(3 <= token < 100 for asked in Streams.seen for token in asked["prompt"])
    assert all(asked["ignore_eos"] and asked["stream"] for asked in Streams.seen)


def test_every_round_has_prompts_of_its_own(server: str) -> None:
    serve_bench.measure([serve_bench.Running("a", Client(server, "known", 30000), os.getpid())], rounds=2)
    prompts = [tuple(asked["prompt"]) for asked in Streams.seen]
    assert len(set(prompts)) == len(prompts)


def test_contestants_take_turns_within_a_measurement(server: str) -> None:
    asked: list[str] = []

    class Noted(Client):
        def together(self, count: int, prompt: int, tokens: int, seed: int) -> list[Arrival]:
            asked.append(f"{self.vocabulary} {count} {prompt} {seed}")
            return super().together(count, prompt, tokens, seed)

    clients = [Noted(server, "known", vocabulary) for vocabulary in (100, 101)]
    serve_bench.measure([serve_bench.Running(str(c.vocabulary), c, os.getpid()) for c in clients], rounds=1)
    assert asked[0::2] == [line.replace("101 ", "100 ") for line in asked[1::2]]


def test_prompts_differ_so_that_no_prefix_cache_answers(server: str) -> None:
    Client(server, "known", 30000).together(4, 64, 2, seed=1)
    assert len({tuple(asked["prompt"]) for asked in Streams.seen}) == 4


def test_a_server_that_refuses_is_quoted(server: str) -> None:
    with pytest.raises(ServeError, match="answered 404"):
        Client(server, "unknown", 100).ask([1], 1)


def test_decode_rate_counts_the_tokens_after_each_first() -> None:
    arrivals = [Arrival(0.0, 1.0, 3.0, 11), Arrival(0.0, 1.5, 6.0, 11)]
    assert decode_rate(arrivals) == 20 / 5


def test_an_environment_with_zentorch_adds_a_row_for_each_folder_and_two_for_int4() -> None:
    folder, python = Path("model"), "/zen/bin/python"
    found = serve_bench.contestants(folder, None, folder, zentorch=python)
    own = {entry.name: entry for entry in found if entry.python == python}
    assert set(own) == {"zentorch-da8w4", "zentorch-w4a16", "zentorch-bf16"}
    assert own["zentorch-da8w4"].environment != own["zentorch-w4a16"].environment
    assert {entry.python for entry in found if entry.name not in own} == {sys.executable}


def test_a_contestant_that_does_not_take_part_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    done = CliRunner().invoke(app, ["bench", "serve", "--int4", str(tmp_path), "--names", "vllm-w8a8"])
    assert isinstance(done.exception, RequestError)
    assert "vllm-w8a8" in str(done.exception)
    assert "vllm-w4a16" in done.exception.hint
    done = CliRunner().invoke(app, ["bench", "serve", "--int4", str(tmp_path), "--zentorch", str(tmp_path / "none")])
    assert "is no Python" in str(done.exception)


def test_ratios_are_of_the_same_round() -> None:
    seen = {
        serve_bench.OURS: {"decode1_tok_s": [30.0, 60.0, 31.0], "ttft_ms": [1.0, 1.0, 1.0]},
        "vllm-bf16": {"decode1_tok_s": [10.0, 20.0, 10.0], "ttft_ms": [1.0, 1.0, 1.0]},
    }
    assert serve_bench.ratios(seen) == {"vllm-bf16": {"decode1_tok_s": {"median": 3.0, "min": 3.0, "max": 3.1}}}
    assert serve_bench.ratios({"vllm-bf16": seen["vllm-bf16"]}) == {}


def test_the_peak_is_the_largest_size_not_the_present_one() -> None:
    script = "import time; x = bytearray(200 << 20); del x; print(flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    peak = serve_bench.peak_memory(child.pid)
    child.kill()
    child.wait()
    if Path("/proc/self/status").exists():
        assert 200 << 20 < peak < 300 << 20


def test_a_table_shows_rates_and_ratios() -> None:
    keys = [name for name in sorted(NAMES) if name.endswith("_tok_s")]
    row = {**dict.fromkeys(keys, 12.5), "ttft_ms": 80.0, "peak_rss_bytes": 3e9, "rounds": 3}
    result = {
        "rows": [{"name": serve_bench.OURS, **row}, {"name": "vllm-bf16", **row}],
        "ratios": {"vllm-bf16": {key: {"median": 3.0, "min": 2.9, "max": 3.2} for key in keys}},
    }
    shown = serve_bench.table(result)
    assert "3000" in shown
    assert "3.00 (2.90-3.20)" in shown


def test_ours_and_stock_serve_the_same_folder_by_environment() -> None:
    entries = {entry.name: entry for entry in serve_bench.contestants(Path("a"), Path("b"), Path("c"))}
    assert entries["qtoolkit-w4a8"].folder == entries["vllm-w4a16"].folder == Path("c")
    assert entries["qtoolkit-w4a8"].environment == {"QTOOLKIT_W4A8": "always"}
    assert set(entries) == {"qtoolkit-w4a8", "vllm-w4a16", "vllm-w8a8", "vllm-bf16"}


def test_ours_also_runs_with_other_output_layers() -> None:
    entries = {entry.name: entry for entry in serve_bench.contestants(None, None, Path("c"), ("int8",))}
    assert entries["qtoolkit-w4a8-head-int8"].environment == {"QTOOLKIT_W4A8": "always", "QTOOLKIT_LM_HEAD": "int8"}


def test_a_servers_environment_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLD", "1")
    with serve_bench._environment({"OLD": "2", "NEW": "3"}):
        assert (os.environ["OLD"], os.environ["NEW"]) == ("2", "3")
    assert os.environ["OLD"] == "1"
    assert "NEW" not in os.environ
