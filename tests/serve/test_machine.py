"""Defaults that let vLLM start on small machines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from qtoolkit.serve import machine
from qtoolkit.serve.launcher import Order
from qtoolkit.serve.machine import bind_threads, cpu_defaults, ranks
from qtoolkit.serve.vllm_server import command, environment


@pytest.mark.parametrize(
    ("cpus", "workers", "nodes", "expected"),
    [
        ([0, 1], 1, 1, ""),  # vLLM's own choice works
        ([0], 1, 1, "nobind"),  # it would keep the only CPU back
        ([0, 1], 2, 1, "0|1"),
        ([0, 1, 2, 3, 4], 2, 1, "0,1|2,3"),
        ([0, 1, 2, 3], 2, 2, ""),
        ([0, 1], 4, 1, "nobind"),
    ],
)
def test_threads_are_bound_where_vllm_would_fail(cpus: list[int], workers: int, nodes: int, expected: str) -> None:
    assert bind_threads(cpus, workers, nodes) == expected


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ((), 1),
        (("-tp", "2"), 2),
        (("--tensor-parallel-size=4", "--dtype", "float32"), 4),
        (("-tp", "2", "-pp", "3"), 6),
        (("--max-model-len", "2"), 1),
    ],
)
def test_worker_processes_are_read_from_the_arguments(extra: Sequence[str], expected: int) -> None:
    assert ranks(extra) == expected


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 2)
    monkeypatch.delenv(machine.BINDING, raising=False)


@pytest.mark.usefixtures("two_cores")
def test_on_few_cores_one_process_schedules_and_computes() -> None:
    assert machine.executor(()) == ["--distributed-executor-backend", machine.IN_ENGINE]
    assert machine.cpu_defaults(()) | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2"} == (
        machine.cpu_defaults(())
    )


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("extra", [("-tp", "2"), ("--distributed-executor-backend", "mp")])
def test_several_ranks_and_another_executor_are_left_to_vllm(extra: Sequence[str]) -> None:
    assert machine.executor(extra) == []
    assert "OMP_NUM_THREADS" not in machine.cpu_defaults(extra)


@pytest.mark.usefixtures("two_cores")
def test_who_binds_threads_gets_vllms_own_arrangement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(machine.BINDING, "0")
    assert machine.executor(()) == []


def test_many_cores_get_vllms_own_arrangement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: machine.FEW_CORES)
    assert machine.executor(()) == []


def test_the_executor_named_is_one_of_vllms() -> None:
    pytest.importorskip("vllm")
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.executor import UniProcExecutor

    assert resolve_obj_by_qualname(machine.IN_ENGINE) is UniProcExecutor


def test_the_cache_fits_the_machine() -> None:
    assert 1 <= int(cpu_defaults(())["VLLM_CPU_KVCACHE_SPACE"]) <= 8


def test_a_cache_size_given_to_vllm_is_not_overruled() -> None:
    assert "VLLM_CPU_KVCACHE_SPACE" not in cpu_defaults(("--kv-cache-memory-bytes", "256M"))


def test_what_the_user_set_goes_before_our_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    made = environment(Order(Path("model"), "model"), Path("reports"))
    assert made["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert made["VLLM_NO_USAGE_STATS"] == "1"


def test_the_key_travels_in_the_environment_only() -> None:
    order = Order(Path("model"), "model", api_key="sk-secret")
    assert environment(order, Path("reports"))["VLLM_API_KEY"] == "sk-secret"
    assert "sk-secret" not in " ".join(command(order, 8000))
