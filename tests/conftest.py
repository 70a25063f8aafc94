"""What many tests need: the reference data when it lies beside the checkout, and small random models."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests_support import save_random

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
