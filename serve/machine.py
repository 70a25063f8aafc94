"""Settings that make vLLM for CPUs start on small and unusual machines, where its own defaults stop it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

GIB = 1 << 30
MOST_CACHE = 8  # GiB of key/value cache that one laptop user needs at most
NODES = Path("/sys/devices/system/node")
PARALLEL = ("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp")
FEW_CORES = 8  # below this, a core kept back for scheduling costs more than it gives
CACHE_SIZE = "--kv-cache-memory-bytes"
BINDING = "VLLM_CPU_OMP_THREADS_BIND"
EXECUTOR = "--distributed-executor-backend"
# By its full name: under its short one, "uni", vLLM for CPUs replaces it.
IN_ENGINE = "vllm.v1.executor.uniproc_executor.UniProcExecutor"


def vllm_is_for_cpu() -> bool:
    """Say whether the installed vLLM was built for CPUs: a distribution of its own, or a local version ``+cpu``."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return name == "vllm-cpu" or "cpu" in version(name)
        except PackageNotFoundError:
            continue
    return False


def has_compiler() -> bool:
    """Say whether torch.compile can build its C++ code here."""
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "g++", "clang++"))


def cpu_defaults(extra: Sequence[str]) -> dict[str, str]:
    """Return environment variables for vLLM on this machine's CPU; the user's own values go first.

    Without them vLLM claims 9/10 of the memory and refuses to start when some of it is in use, and it refuses tensor
    parallelism on machines with one memory node.
    """
    free = psutil.virtual_memory().available // GIB
    sized = any(argument.split("=")[0] == CACHE_SIZE for argument in extra)  # which the variable would overrule
    chosen = {} if sized else {"VLLM_CPU_KVCACHE_SPACE": str(max(1, min(MOST_CACHE, free // 4)))}
    if runs_in_engine(extra):
        return chosen | {BINDING: "nobind", "OMP_NUM_THREADS": str(cores())}
    nodes = len(list(NODES.glob("node[0-9]*")))
    binding = bind_threads(cpus(), ranks(extra), nodes)
    return chosen | ({BINDING: binding} if binding else {})


def cpus() -> list[int]:
    """Return the CPUs this process may run on."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def cores() -> int:
    """Return how many physical cores those are at most: two threads of a core share what matrix products need."""
    return min(len(cpus()), psutil.cpu_count(logical=False) or len(cpus()))


def executor(extra: Sequence[str]) -> list[str]:
    """Return the argument that lets the model run in the engine's own process, where that is better."""
    return [EXECUTOR, IN_ENGINE] if runs_in_engine(extra) else []


def runs_in_engine(extra: Sequence[str]) -> bool:
    """Say whether one process shall schedule and compute: a single rank, few cores, nothing else asked for.

    vLLM for CPUs otherwise starts a worker process and leaves it all cores but one. The engine polls for each answer
    as fast as it can, and so takes the core that was kept back; with two cores the model runs on one of them. In one
    process nobody polls: the model gets all cores, and the worker's memory (0.8 GB before any weight) is saved.
    """
    asked = os.environ.get(BINDING) or any(argument.split("=")[0] == EXECUTOR for argument in extra)
    return not asked and ranks(extra) == 1 and cores() < FEW_CORES


def ranks(extra: Sequence[str]) -> int:
    """Return how many worker processes vLLM's arguments ask for on this machine."""
    total = 1
    for at, argument in enumerate(extra):
        name, _, value = argument.partition("=")
        value = value or (extra[at + 1] if at + 1 < len(extra) else "")
        if name in PARALLEL and value.isdecimal():
            total *= int(value)
    return total


def bind_threads(cpus: Sequence[int], workers: int, nodes: int) -> str:
    """Return ``VLLM_CPU_OMP_THREADS_BIND``: CPUs per worker, "nobind", or "" where vLLM's own choice works.

    vLLM gives each worker a memory node and keeps one CPU back; it fails with fewer nodes than workers, or one CPU.
    """
    if workers <= max(nodes, 1) and len(cpus) > 1:
        return ""
    if workers < 2 or len(cpus) < workers:
        return "nobind"
    share = len(cpus) // workers
    return "|".join(",".join(map(str, cpus[w * share : (w + 1) * share])) for w in range(workers))
