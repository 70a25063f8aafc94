"""The GPU benchmark from start to end on a pretended card: torch's CUDA calls are stubs, kernels run in the emulation.

What a GPU alone can tell is not seen here; that every step calls the next one rightly is.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from qtoolkit.evals.gpu_bench import clock, contenders, correctness, steps
from qtoolkit.evals.gpu_bench.session import Run
from qtoolkit.kernels.cuda import backend, compiler, plan
from qtoolkit.kernels.cuda.source import Tiling
from qtoolkit.kernels.selection import Problem
from qtoolkit.kernels.triton import backend as triton_backend

from .cuda_emulator import COMPILER, Emulator

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_gpu.py"
CARD = "NVIDIA Test 80GB"


class OnTheCpu(TorchFunctionMode):
    """Makes tensors on the CPU where CUDA is asked for."""

    def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return call(*args, **kwargs)


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return False

    def elapsed_time(self, other: Event) -> float:
        return 1000 * (other.at - self.at)


class Stream:
    cuda_stream = 0


class Generator(torch.Generator):
    def __new__(cls, device: str = "cpu") -> Generator:
        return super().__new__(cls, "cpu")


class Graph:
    def replay(self) -> None:
        time.sleep(1e-4)


class Profile:
    """Saw one kernel, and the host's part of its launch."""

    def __init__(self, activities: object) -> None:
        kinds = (("a kernel", torch.autograd.DeviceType.CUDA), ("cuLaunchKernelEx", torch.autograd.DeviceType.CPU))
        self.events = [SimpleNamespace(key=key, device_type=kind) for key, kind in kinds]

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None: ...

    def key_averages(self) -> list[SimpleNamespace]:
        return self.events


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulator = Emulator(tmp_path)

    @contextlib.contextmanager
    def place_of(x: torch.Tensor) -> Iterator[backend.Place]:
        yield emulator.place(everything_readable=True)

    def nothing(*_: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    stubs = {"Event": Event, "CUDAGraph": Graph, "graph": nothing, "stream": nothing, "Stream": Stream}
    stubs |= {"synchronize": lambda: None, "is_available": lambda: True, "get_device_capability": lambda *_: (9, 0)}
    stubs |= {"mem_get_info": lambda: (1 << 20, 1 << 20), "get_device_name": lambda: CARD}
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(backend, "place_of", place_of)
    real = backend.refuse

    def refuse(problem: Problem) -> str | None:
        return real(replace(problem, device="cuda"))

    monkeypatch.setattr(backend, "refuse", refuse)
    monkeypatch.setattr(backend, "BACKENDS", tuple(replace(b, refuse=refuse) for b in backend.BACKENDS))
    monkeypatch.setattr(triton_backend, "refuse", lambda problem: "not here")
    gone = tuple(replace(b, refuse=triton_backend.refuse) for b in triton_backend.BACKENDS)
    monkeypatch.setattr(triton_backend, "BACKENDS", gone)
    monkeypatch.setattr(compiler, "version", lambda: "nvrtc 13.0")
    monkeypatch.setattr(compiler, "cubin", lambda text: b"\x7fELF")
    monkeypatch.setattr(plan, "SHAPES", (Tiling(8, 1, 1, 2), Tiling(8, 1, 1, 2, fused=True)))
    monkeypatch.setattr(plan, "SPLITS", (1, 2))
    monkeypatch.setattr(correctness, "OPERATORS", ((3, 136, 264),))
    monkeypatch.setattr(correctness, "TILED", (128, 256))
    monkeypatch.setattr(correctness, "TILED_TOKENS", (5,))
    monkeypatch.setattr(steps, "LARGE", 128)
    monkeypatch.setattr(steps, "SERIES", ("128x256",))
    monkeypatch.setattr(steps.series, "__defaults__", (2,))
    monkeypatch.setenv("QTOOLKIT_TUNING", str(tmp_path))
    for cached in (plan.table, plan.choose):
        cached.cache_clear()


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="needs g++")
def test_every_step_of_a_run_leads_to_the_next(
    pretended: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    out = tmp_path / "result.json"
    asked = script.arguments(["--out", str(out), "--repeats", "2", "--tune", "--until", "0"])
    with OnTheCpu():
        run = Run("cuda", clock.GpuClock(1 << 12), time.monotonic() + 600, out)
        script.measure(run, asked, contenders.CONTENDERS, ["128x256"], [1, 16])
    run.keep(finished=True)
    result = json.loads(out.read_text())
    assert result["checks"]["wrong"] == []
    assert result["checks"]["run"] >= 12
    own = [c.name for c in contenders.CONTENDERS if c.kind == "ours" and c.of == "cuda"]
    for name in (*own, "torch.mm bf16", "torch._scaled_mm fp8", "torch._int_mm"):
        assert set(result["times"][name]["128x256"]) == {"1", "16"}
    assert set(result["ceilings"]) == {"bytes_per_second", "torch.mm bf16", "torch._int_mm", "torch._scaled_mm fp8"}
    assert all(error < 0.02 for error in result["errors"].values())
    assert set(result["series"]) == {"torch.mm bf16", "ours", "ours, two launches"}
    assert result["tuning"]["points"] == 4
    assert (tmp_path / "cuda-nvidia_test.json").exists()
    assert result["spread"] is not None
    assert result["kernels"]["ours M=16"] == ["a kernel"]
    unexpected = [
        note
        for note in result["could_not"]
        if "not here" not in note and "humming" not in note and "gemlite" not in note
    ]
    assert not unexpected
    script.print_report(result)
    said = capsys.readouterr().out
    shares = [f"ours g128 folded: speed as a share of {other}" for other in ("ours per channel", "ours g128")]
    for title in ("ours: times faster than torch.mm bf16", "than the best peer", "fraction of the roofline", *shares):
        assert title in said
