"""The kernel benchmark compares in turns, states the machine's limits, and keeps the names its readers know."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from qtoolkit.errors import RequestError
from qtoolkit.evals import kernel_bench, kernel_peers, kernel_remote, roofline
from qtoolkit.evals.kernel_workers import loop
from qtoolkit.kernels import reference, selection
from qtoolkit.kernels.cpu import library

NAMES = ("qtoolkit-g128", "qtoolkit-channel", "torch-bf16")


@pytest.fixture(autouse=True)
def _few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers here are small: as many as a figure needs would take half a minute to make."""
    monkeypatch.setattr(kernel_bench, "ROTATED", (1 << 20, 1 << 20))


@pytest.mark.parametrize(("cache", "contestants", "rotated"), [
    ("32768K\n", 5, 128), ("102400K\n", 5, 200), ("491520K\n", 5, 512), ("491520K\n", 20, 300), ("", 5, 128),
])  # fmt: skip
def test_weights_are_walked_that_no_cache_holds_and_memory_does(
    cache: str, contestants: int, rotated: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_bench, "LARGEST_CACHE", tmp_path / "size")
    monkeypatch.setattr(kernel_bench, "ROTATED", (128 << 20, 512 << 20))
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 24_000 << 10, "SC_PAGE_SIZE": 1 << 10}.__getitem__)
    if cache:
        kernel_bench.LARGEST_CACHE.write_text(cache)
    assert kernel_bench._rotated(contestants) == rotated << 20


def test_rows_and_limits_have_the_documented_names() -> None:
    result = kernel_bench.run(((256, 128),), (1, 3), NAMES, seconds=0.01)
    assert [(row["k"], row["n"], row["m"], row["name"]) for row in result["rows"]] == [
        (256, 128, m, name) for m in (1, 3) for name in NAMES
    ]
    for row in result["rows"]:
        assert row["runs"] >= 5
        assert 0 < row["min_us"] <= row["median_us"] <= row["max_us"]
    assert set(result["limits"]) == {"bandwidth_gbs", "int8_gops"}
    if library.failure() is None:
        assert result["limits"]["bandwidth_gbs"] > 0
    text = kernel_bench.table(result)
    assert all(name in text for name in NAMES)
    assert text.count("\n") >= 6


def test_an_unknown_contestant_is_refused_with_those_there_are() -> None:
    with pytest.raises(RequestError, match="no contestant nobody here") as raised:
        kernel_peers.peers(("nobody",))
    assert "torch-bf16" in raised.value.hint


@pytest.mark.parametrize("peer", kernel_peers.local_peers(), ids=lambda peer: peer.name)
def test_every_contestant_multiplies(peer: kernel_peers.Peer) -> None:
    torch.manual_seed(0)
    layer = peer.make(256, 128)
    x = torch.randn(5, 256).bfloat16()
    y = layer(x)
    assert y.shape == (5, 128)
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()
    # activations of twice the size give outputs of twice the size: the layer is linear, int8 activations included
    assert torch.allclose(layer(2 * x).float(), 2 * y.float(), rtol=0.02, atol=0.02 * float(y.float().abs().max()))


def test_ours_is_the_product_that_is_served() -> None:
    x = torch.randn(3, 256).bfloat16()
    torch.manual_seed(1)
    got = kernel_peers.ours(128)(256, 128)(x)
    torch.manual_seed(1)
    scales = (torch.rand(128, 2) * 0.01).bfloat16()
    codes = reference.unpack_int4(kernel_peers.random_int4(256, 128), 256)
    assert torch.equal(got, reference.w4a8_linear(x, codes, scales, None, 128))


def test_the_folded_contestant_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = []
    prepare = selection.prepare
    monkeypatch.setattr(selection, "prepare", lambda *args: layouts.append(prepare(*args)) or layouts[-1])
    for folds in (True, False):
        kernel_peers.ours(128, folds)(256, 128)
    assert [layer.layout.endswith(" folded") for layer in layouts] == [True, False]


@pytest.mark.parametrize(("takes", "calls", "counted"), [(1.0, 2, 1), (2**-9, 9, 3)])  # warm for 10 ms, then 5 ms
def test_timed_calls_follow_a_warm_up(takes: float, calls: int, counted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: takes * len(clock))
    assert loop.timed(lambda: clock.append(0.0)) == [takes] * counted
    assert len(clock) - 1 == calls


WORKER = """
import time
from loop import Kind, serve

print("a library that prints")
serve({"sleeper": Kind(4.5, True, lambda k, n: lambda m: time.sleep(m / 1000))})
"""


def test_a_contestant_that_cannot_multiply_here_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(k: int, n: int) -> kernel_peers.Layer:
        raise RuntimeError("could not create\na primitive")

    found = (kernel_peers.Peer("broken", 16, breaks, False), *kernel_peers.local_peers()[:1])
    monkeypatch.setattr(kernel_bench, "peers", lambda names, workers: found)
    result = kernel_bench.run(((256, 128),), (1,), seconds=0.01)
    assert {row["name"] for row in result["rows"]} == {"qtoolkit-g128"}
    assert result["refused"] == {"broken": "could not create a primitive"}
    assert "broken could not run: could not create a primitive" in kernel_bench.table(result)
    monkeypatch.setattr(kernel_bench, "peers", lambda names, workers: found[:1])
    with pytest.raises(RequestError, match="No contestant could multiply"):
        kernel_bench.run(((256, 128),), (1,), seconds=0.01)


def test_a_worker_is_timed_in_turns_with_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "sleeper.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(kernel_remote.FOLDER)!r})\n{WORKER}")
    monkeypatch.setitem(kernel_remote.WORKERS, "sleeper", str(script))
    with kernel_remote.workers([f"sleeper={sys.executable}"]) as workers:
        result = kernel_bench.run(((256, 128),), (2, 20), ("torch-bf16", "sleeper"), 0.01, workers=workers)
        process = workers[0].process
    assert process.wait(10) == 0  # its standard input has ended
    times = {row["m"]: row["min_us"] for row in result["rows"] if row["name"] == "sleeper"}
    assert times[2] >= 2000  # it slept that long itself; nothing is said about how much longer a busy machine takes
    assert times[20] >= 20_000
    found = roofline.write(result, tmp_path / "out")
    assert found.read_text().startswith("<?xml")
    assert "sleeper" in (tmp_path / "out" / "kernels.md").read_text()


@pytest.mark.parametrize("word", ["nobody=/bin/sh", "zentorch=/no/such/python", "zentorch"])
def test_a_peer_that_cannot_start_is_refused(word: str) -> None:
    with pytest.raises(RequestError, match="names no worker"), kernel_remote.workers([word]):
        pass


def test_a_worker_that_dies_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "dies.py"
    script.write_text("raise SystemExit(3)")
    monkeypatch.setitem(kernel_remote.WORKERS, "dies", str(script))
    with (
        pytest.raises(RequestError, match="ended with status 3"),
        kernel_remote.workers([f"dies={sys.executable}"]),
    ):
        pass
