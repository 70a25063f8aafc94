"""transformers without what it does not need here: what is left out comes when it is called."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

CODE = """
import json, sys
from qtoolkit.lightly import load_transformers
load_transformers()
loaded = [name for name in ("sklearn", "scipy.optimize", "pandas", "triton") if name in sys.modules]
from transformers.generation import candidate_generator
rates = candidate_generator.roc_curve([0, 1], [0.1, 0.9])[1].tolist()
import scipy.optimize, sklearn.metrics
row, column = scipy.optimize.linear_sum_assignment([[1.0, 0.0], [0.0, 1.0]])
print(json.dumps([loaded, rates, column.tolist(), sklearn.metrics.roc_curve.__module__]))
"""


def test_what_is_left_out_comes_when_it_is_called() -> None:
    pytest.importorskip("sklearn")
    out = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout
    loaded, rates, column, module = json.loads(out)
    assert loaded == []
    assert rates == [0.0, 1.0, 1.0]
    assert column == [1, 0]
    assert module.startswith("sklearn.")  # the real module, once it was asked for
