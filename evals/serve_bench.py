"""Times servers of one model against each other on this machine: prefill, decode, many clients, memory."""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from qtoolkit.evals.serve_client import Client, decode_rate
from qtoolkit.serve.intent import HEAD, MODE

PREFILL = (512, 1024)  # tokens of a prompt
BATCHES = (1, 4, 16)
PROMPT, NEW = 16, 64  # tokens before and of a decoded text
CLIENTS, CLIENT_PROMPT, CLIENT_NEW = 32, 64, 32
OURS = "qtoolkit-w4a8"
# Cache for 11,000 tokens of a 1.1 B model instead of gigabytes: several servers stand in memory at once.
CACHE = "256M"
ZEN_INT8 = "VLLM_CPU_INT4_W4A8"  # vLLM's switch: zentorch runs int4 layers with int8 activations
ARGUMENTS = ("--kv-cache-memory-bytes", CACHE, "--max-model-len", "2048")


@dataclass(frozen=True)
class Contestant:
    """A model folder, the environment its server gets, and the Python whose vLLM serves it."""

    name: str
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    python: str = sys.executable


@dataclass(frozen=True)
class Running:
    """A contestant's server that answers."""

    name: str
    client: Client
    pid: int


def contestants(
    bf16: Path | None, int8: Path | None, int4: Path | None, heads: tuple[str, ...] = (), zentorch: str = ""
) -> tuple[Contestant, ...]:
    """Return ours and vLLM's own ways to serve one model's folders: bf16, W8A8 and int4 (compressed-tensors).

    ``heads`` adds ours once more for each kind of output layer: "int8", "int4". ``zentorch`` is a Python with vLLM and
    zentorch, which vLLM then takes by itself on AMD's CPUs: it gets a row for each folder, and two for int4.
    """
    found = []
    if int4:
        found.append(Contestant(OURS, int4, {MODE: "always"}))
        found += [Contestant(f"{OURS}-head-{head}", int4, {MODE: "always", HEAD: head}) for head in heads]
        found.append(Contestant("vllm-w4a16", int4, {MODE: "off"}))
    if int8:
        found.append(Contestant("vllm-w8a8", int8, {MODE: "off"}))
    if bf16:
        found.append(Contestant("vllm-bf16", bf16, {MODE: "off"}))
    if zentorch:
        for name, folder, own in (
            ("da8w4", int4, {ZEN_INT8: "1"}), ("w4a16", int4, {ZEN_INT8: "0"}), ("w8a8", int8, {}), ("bf16", bf16, {}),
        ):  # fmt: skip
            if folder:
                found.append(Contestant(f"zentorch-{name}", folder, {MODE: "off", **own}, zentorch))
    return tuple(found)


def run(
    entries: tuple[Contestant, ...],
    rounds: int = 3,
    extra: tuple[str, ...] = (),
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Start every contestant's server, then time them in turns: each measurement on all of them, ``rounds`` times.

    All servers stay up, so what is compared lies seconds apart and a machine whose speed drifts does not choose the
    winner; one that is not asked does nothing. The load of many clients comes once, at the end.

    Args:
        entries: who takes part; all servers get the same arrangement of processes and threads.
        rounds: how often; medians are reported.
        extra: arguments for vLLM, as behind ``qtoolkit serve ... --``.
        say: called with lines of progress, the servers' own among them.

    Returns:
        ``rows`` [{name, prefill512_tok_s, prefill1024_tok_s, decode1_tok_s, decode4_tok_s, decode16_tok_s, ttft_ms,
        load32_tok_s, load32_ttft_ms, peak_rss_bytes, rounds}], ``ratios`` {peer: {measurement: {median, min, max}}} of
        ours over the peer in the same round, and ``kernels`` {name: {kernel: layers}}. ``ttft_ms`` is that of a
        512-token prompt alone; ``peak_rss_bytes`` sums the largest resident sizes of the server's processes since
        they started.
    """
    with ExitStack() as up:
        servers, kernels = [], {}
        for entry in entries:
            server, kernels[entry.name] = up.enter_context(_serve(entry, extra, say))
            servers.append(server)
        seen = measure(servers, rounds, say)
        peaks = {server.name: peak_memory(server.pid) for server in servers}
    rows = []
    for name, runs in seen.items():
        middle = {key: statistics.median(values) for key, values in runs.items()}
        rows.append({"name": name, **middle, "peak_rss_bytes": float(peaks[name]), "rounds": rounds})
    return {"rows": rows, "ratios": ratios(seen), "kernels": kernels}


@contextmanager
def _serve(
    entry: Contestant, extra: tuple[str, ...], say: Callable[[str], None]
) -> Iterator[tuple[Running, dict[str, int]]]:
    from qtoolkit.serve.launcher import Order
    from qtoolkit.serve.vllm_server import running

    vocabulary = int(json.loads((entry.folder / "config.json").read_text())["vocab_size"])
    order = Order(path=entry.folder, name=entry.name, port=0, extra=(*ARGUMENTS, *extra), python=entry.python)
    with ExitStack() as up:
        with _environment(entry.environment):
            server = up.enter_context(running(order, say))
        client = Client(server.ready.url, server.ready.model, vocabulary)
        client.together(1, PROMPT, 8, seed=0)  # first requests compile and allocate
        yield Running(entry.name, client, server.child.pid), server.ready.kernels


def measure(
    servers: list[Running], rounds: int, say: Callable[[str], None] = lambda line: None
) -> dict[str, dict[str, list[float]]]:
    """Time running servers in turns; returns name -> measurement -> one value a round, named as ``run`` says."""
    seen: dict[str, dict[str, list[float]]] = {server.name: {} for server in servers}

    def note(server: Running, key: str, value: float) -> None:
        seen[server.name].setdefault(key, []).append(value)

    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        seed = 1000 * number
        for length in PREFILL:
            for server in servers:
                (answer,) = server.client.together(1, length, 1, seed + length)
                note(server, f"prefill{length}_tok_s", length / (answer.first - answer.sent))
                if length == PREFILL[0]:
                    note(server, "ttft_ms", (answer.first - answer.sent) * 1e3)
        for batch in BATCHES:
            for server in servers:
                answers = server.client.together(batch, PROMPT, NEW, seed + batch)
                note(server, f"decode{batch}_tok_s", decode_rate(answers))
    for server in servers:
        say(f"{CLIENTS} clients on {server.name}")
        load = server.client.together(CLIENTS, CLIENT_PROMPT, CLIENT_NEW, CLIENTS)
        spent = max(a.end for a in load) - min(a.sent for a in load)
        note(server, f"load{CLIENTS}_tok_s", CLIENTS * CLIENT_NEW / spent)
        note(server, f"load{CLIENTS}_ttft_ms", statistics.median(a.first - a.sent for a in load) * 1e3)
    return seen


def ratios(seen: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return, for every peer and rate, how many times its rate ours has: the median, least and most of the rounds."""
    ours = seen.get(OURS, {})
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, runs in seen.items():
        for key, values in runs.items():
            if name != OURS and key.endswith("_tok_s") and key in ours:
                each = [own / peer for own, peer in zip(ours[key], values, strict=True)]
                found.setdefault(name, {})[key] = {
                    "median": statistics.median(each), "min": min(each), "max": max(each),
                }  # fmt: skip
    return found


def peak_memory(pid: int) -> int:
    """Return the bytes that a process and all below it have had resident at most, each on its own."""
    return sum(_peak(process) for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)])


def _peak(process: psutil.Process) -> int:
    status = Path(f"/proc/{process.pid}/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else int(process.memory_info().rss)


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
    """Render a result as text: rates, one line a contestant, then how many times each peer's rate ours has."""
    head = ["prefill512", "prefill1024", "decode1", "decode4", "decode16", f"load{CLIENTS}"]
    lines = [
        "tokens a second",
        f"{'name':<24}" + "".join(f"{name:>12}" for name in head) + f"{'ttft ms':>10}{'peak MB':>9}",
    ]
    for row in result["rows"]:
        rates = "".join(f"{row[f'{name}_tok_s']:>12.1f}" for name in head)
        lines.append(f"{row['name']:<24}{rates}{row['ttft_ms']:>10.0f}{row['peak_rss_bytes'] / 1e6:>9.0f}")
    if result["ratios"]:
        lines.append(f"{OURS} over each, median of {result['rows'][0]['rounds']} rounds (least to most)")
    for name, rates in result["ratios"].items():
        cells = (rates[f"{key}_tok_s"] for key in head)
        lines.append(
            f"{name:<24}" + "".join(f" {c['median']:.2f} ({c['min']:.2f}-{c['max']:.2f})".rjust(18) for c in cells)
        )
    return "\n".join(lines)
