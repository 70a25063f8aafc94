"""Times servers of one model in turns on this machine: prefill, decode at several batches, many clients, memory."""

from __future__ import annotations

import json
import os
import statistics
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from qtoolkit.evals.serve_client import Client, decode_rate
from qtoolkit.serve.intent import MODE

PREFILL = (512, 1024)  # tokens of a prompt
BATCHES = (1, 4, 16)
PROMPT, NEW = 16, 64  # tokens before and of a decoded text
CLIENTS, CLIENT_PROMPT, CLIENT_NEW = 32, 64, 32
REPEATS = 3  # prompts of each length; the median counts


@dataclass(frozen=True)
class Contestant:
    """A model folder and the environment its server gets."""

    name: str
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)


class Measured(Exception):  # not an error: it ends a server whose measurements are taken
    """The measurements of one server, thrown through the launcher so that it stops the server."""

    def __init__(self, row: dict[str, float]) -> None:
        super().__init__()
        self.row = row


def contestants(bf16: Path | None, int8: Path | None, int4: Path | None) -> tuple[Contestant, ...]:
    """Return ours and vLLM's own ways to serve one model's folders: bf16, W8A8 and int4 (compressed-tensors)."""
    found = []
    if int4:
        found += [Contestant("qtoolkit-w4a8", int4, {MODE: "always"}), Contestant("vllm-w4a16", int4, {MODE: "off"})]
    if int8:
        found.append(Contestant("vllm-w8a8", int8, {MODE: "off"}))
    if bf16:
        found.append(Contestant("vllm-bf16", bf16, {MODE: "off"}))
    return tuple(found)


def run(
    entries: tuple[Contestant, ...],
    rounds: int = 1,
    extra: tuple[str, ...] = (),
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Serve and time every contestant, in turns, ``rounds`` times.

    Args:
        entries: who takes part.
        rounds: how often each server is started and timed; medians over the rounds are reported.
        extra: arguments for vLLM, as behind ``qtoolkit serve ... --``.
        say: called with lines of progress, the servers' own among them.

    Returns:
        ``rows`` [{name, prefill512_tok_s, prefill1024_tok_s, decode1_tok_s, decode4_tok_s, decode16_tok_s, ttft_ms,
        load32_tok_s, load32_ttft_ms, peak_rss_bytes, rounds}]. ``ttft_ms`` is that of a 512-token prompt alone;
        ``peak_rss_bytes`` sums the largest resident sizes of the server's processes.
    """
    seen: dict[str, list[dict[str, float]]] = {entry.name: [] for entry in entries}
    for number in range(rounds):
        for entry in entries:
            say(f"round {number + 1} of {rounds}: {entry.name}")
            seen[entry.name].append(_serve_and_measure(entry, extra, say))
    rows = []
    for name, runs in seen.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        rows.append({"name": name, **middle, "rounds": len(runs)})
    return {"rows": rows}


def _serve_and_measure(entry: Contestant, extra: tuple[str, ...], say: Callable[[str], None]) -> dict[str, float]:
    from qtoolkit.serve.launcher import Order, Ready
    from qtoolkit.serve.vllm_server import serve_with_vllm

    vocabulary = int(json.loads((entry.folder / "config.json").read_text())["vocab_size"])

    def measure_and_stop(ready: Ready) -> None:
        raise Measured(measure(Client(ready.url, ready.model, vocabulary)))

    order = Order(path=entry.folder, name=entry.name, port=0, extra=extra)
    with _environment(entry.environment):
        try:
            serve_with_vllm(order, measure_and_stop, say)
        except Measured as measured:
            return measured.row
    raise AssertionError("serving only ends by an exception")


def measure(client: Client) -> dict[str, float]:
    """Time one running server that this process started; see ``run`` for the names."""
    row: dict[str, float] = {}
    with _peak_memory() as peak:
        client.together(1, PROMPT, 8, seed=0)  # first requests compile and allocate
        for length in PREFILL:
            first = [client.together(1, length, 1, seed=length + i)[0] for i in range(REPEATS)]
            seconds = statistics.median(a.first - a.sent for a in first)
            row[f"prefill{length}_tok_s"] = length / seconds
            if length == PREFILL[0]:
                row["ttft_ms"] = seconds * 1e3
        for batch in BATCHES:
            row[f"decode{batch}_tok_s"] = decode_rate(client.together(batch, PROMPT, NEW, seed=batch))
        load = client.together(CLIENTS, CLIENT_PROMPT, CLIENT_NEW, seed=CLIENTS)
        spent = max(a.end for a in load) - min(a.sent for a in load)
        row[f"load{CLIENTS}_tok_s"] = CLIENTS * CLIENT_NEW / spent
        row[f"load{CLIENTS}_ttft_ms"] = statistics.median(a.first - a.sent for a in load) * 1e3
    row["peak_rss_bytes"] = float(sum(peak.values()))
    return row


@contextmanager
def _peak_memory() -> Iterator[dict[int, int]]:
    """Note, every half second, the largest resident size of each process below this one."""
    peak: dict[int, int] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            for child in psutil.Process().children(recursive=True):
                try:
                    peak[child.pid] = max(peak.get(child.pid, 0), child.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


@contextmanager
def _environment(own: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def table(result: dict[str, Any]) -> str:
    """Render a result as text, one line a contestant."""
    head = ["prefill512", "prefill1024", "decode1", "decode4", "decode16", f"load{CLIENTS}"]
    lines = [f"{'name':<16}" + "".join(f"{name:>12}" for name in head) + f"{'ttft ms':>10}{'peak MB':>9}"]
    for row in result["rows"]:
        rates = "".join(f"{row[f'{name}_tok_s']:>12.1f}" for name in head)
        lines.append(f"{row['name']:<16}{rates}{row['ttft_ms']:>10.0f}{row['peak_rss_bytes'] / 1e6:>9.0f}")
    return "\n".join(["tokens a second", *lines])
