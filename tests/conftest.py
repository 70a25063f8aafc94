"""What many tests need: the reference data when it lies beside the checkout, and small random models."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests_support import save_random

from qtoolkit.kernels.cpu.rounding import library as rounding

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test of the default tier may reach for the network

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of reference data beside the checkout; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip("the reference data (../shared/data) is not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved two-block Llama with random bfloat16 weights, grouped-query attention, and the bundled tokenizer."""
    return save_random(tmp_path_factory.mktemp("random") / "llama", "llama")


@pytest.fixture(params=["torch", "avx512", "avx2", "portable"])
def rounding_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make one way, a native code path or torch, the only one that rounding loops take."""
    name = request.param
    if name == "torch":
        monkeypatch.setattr(rounding, "failure", lambda: "not here")
        return name
    if rounding.failure():
        pytest.skip(rounding.failure() or "")
    own = rounding.load()
    if name not in own.paths:
        pytest.skip(f"this CPU has no {name}")
    other = type(own)(own.functions, own.file, own.paths, name)
    monkeypatch.setattr(rounding, "load", lambda: other)
    return name
