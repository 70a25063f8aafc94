"""A small float model whose layers fit every layout, and the bundled model quantized once."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests_support import save_random

import qtoolkit

QUICK = {"calibration.samples": 1, "calibration.length": 32}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block with sizes of whole multiples of 128; its layers are drawn anew by each test."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    return save_random(tmp_path_factory.mktemp("base") / "float", num_hidden_layers=1, **sizes)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, rounded to nearest in groups of 128."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-int4"
    qtoolkit.quantize("tiny", "rtn", folder, changes=QUICK)
    return folder
