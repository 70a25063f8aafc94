"""transformers without what it does not need here: what is left out comes when it is called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BY_ITSELF = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may be one of several, and its compiler wanted")
CODE = """
import json, sys
from qtoolkit.lightly import load_transformers, work_alone
work_alone()
load_transformers()
left_out = ("sklearn", "scipy.optimize", "pandas", "triton", "torch._dynamo", "torch.distributed.tensor", "sympy")
loaded = [name for name in left_out if name in sys.modules]
from transformers.generation import candidate_generator
rates = candidate_generator.roc_curve([0, 1], [0.1, 0.9])[1].tolist()
import scipy.optimize, sklearn.metrics
row, column = scipy.optimize.linear_sum_assignment([[1.0, 0.0], [0.0, 1.0]])
print(json.dumps([loaded, rates, column.tolist(), sklearn.metrics.roc_curve.__module__]))
"""


QUANTIZE = """
import json, sys
from qtoolkit import quantize
from qtoolkit.lightly import work_alone
work_alone()
changes = {"calibration.samples": 4, "calibration.length": 64}  # of text that the model writes itself
quantize("tiny", "w4a8", sys.argv[1], changes=changes)
print(json.dumps([name for name in ("torch._dynamo", "sympy", "triton") if name in sys.modules]))
"""

COMPILER = """
import json, sys
import torch
from qtoolkit.lightly import compiler_later

runs = {"constant": 0}
with compiler_later():
    @torch.compiler.disable
    def disabled(x):
        return x + 1 if torch.compiler.is_compiling() else x - 1

    @torch.compiler.disable(recursive=False)
    def alone(x):
        return x * (3 if torch.compiler.is_compiling() else 5)

    @torch._dynamo.assume_constant_result
    def constant():
        runs["constant"] += 1
        return 2

    @torch.compiler.allow_in_graph
    def opaque(x):
        torch._dynamo.graph_break()
        return x * 2

    before = "torch._dynamo" in sys.modules and sys.modules["torch._dynamo"].__spec__ is not None

x = torch.ones(3)
plain = float(disabled(x)[0]), float(alone(x)[0]), "torch._dynamo" in sys.modules
graphs = []

def backend(graph, inputs):
    graphs.append([node.target.__name__ for node in graph.graph.nodes if callable(node.target)])
    return graph.forward

compiled = torch.compile(lambda x: alone(disabled(x * 3) * 7), backend=backend)
around = float(compiled(x)[0])
broken = len(graphs)
graphs.clear()
whole = torch.compile(lambda x: opaque(x) + constant(), backend=backend, fullgraph=True)
inside = float(whole(x)[0]), float(whole(x)[0])
finders = [type(finder).__name__ for finder in sys.meta_path]
print(json.dumps([before, plain, around, broken, inside, graphs, runs["constant"], "_Informed" in finders]))
"""

ASKED = """
import json, sys
from qtoolkit.lightly import compiler_later
with compiler_later():
    if sys.argv[1] == "inside":
        from torch._dynamo.utils import istype
    elif sys.argv[1] == "class":
        import torch
        torch.compiler.disable(torch.nn.Linear(1, 1))
    else:
        import torch._dynamo
        torch._dynamo.config.verbose
import torch._dynamo
import torch._dynamo.utils
print(json.dumps([torch._dynamo.__spec__ is not None, torch._dynamo.utils.__name__]))
"""

MASK = """
import json
import torch
from qtoolkit.lightly import load_transformers
load_transformers()
from transformers import LlamaConfig, masking_utils

config = LlamaConfig(attn_implementation="sdpa")
graphs = []

def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward

def masked(x):
    either = lambda batch, head, q, k: (q - k).abs() < 2
    return masking_utils.create_causal_mask(config, x, None, past_key_values=None, or_mask_function=either)

x = torch.ones(1, 4, 8)
wanted = masked(x)
found = torch.compile(masked, backend=backend, fullgraph=True)(x)
print(json.dumps([torch.equal(wanted, found), len(graphs), type(masking_utils.TransformGetItemToIndex).__name__]))
"""

THREADS = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
import torch
from qtoolkit import architecture
from qtoolkit.source import resolve
sys.setswitchinterval(1e-5)
made, done = [], False

def make():
    while not done:
        made.append(torch.nn.Linear(2, 2).weight.device.type)

with ThreadPoolExecutor(3) as pool:
    other = pool.submit(make)
    built = [pool.submit(architecture.skeleton, resolve("tiny")) for _ in range(4)]
    models = [each.result().model for each in built]
    done = True
    other.result()
left = {parameter.device.type for model in models for parameter in model.parameters()} - {"meta"}
left |= {device for device in made if device != "cpu"}
print(json.dumps([torch.nn.Linear(2, 2).weight.device.type, len(models), sorted(left)]))
"""

DISTRIBUTED = """
import sys
import torch
from qtoolkit.lightly import load_transformers, work_alone
if sys.argv[1] == "alone":
    work_alone()
load_transformers()
from transformers.utils import is_torch_distributed_available
print(f"[{int(is_torch_distributed_available())}, {int(torch.distributed.is_available())}]")
"""


def answer(code: str, *args: str, **environment: str) -> Any:
    """What ``code`` prints as JSON in a process of its own."""
    environment = {**os.environ, **environment}
    run = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@BY_ITSELF
def test_what_is_left_out_comes_when_it_is_called() -> None:
    pytest.importorskip("sklearn")
    loaded, rates, column, module = answer(CODE)
    assert loaded == []
    assert rates == [0.0, 1.0, 1.0]
    assert column == [1, 0]
    assert module.startswith("sklearn.")  # the real module, once it was asked for


@BY_ITSELF
def test_quantizing_loads_no_compiler(tmp_path: Path) -> None:
    assert answer(QUANTIZE, str(tmp_path / "out")) == []


def test_the_compiler_knows_later_what_it_was_told_before_it_was_there() -> None:
    before, plain, around, broken, inside, graphs, runs, waiting = answer(COMPILER)
    assert not before
    assert plain == [0.0, 5.0, False]  # called without it, they did not load it either
    assert around == (3 - 1) * 7 * 5
    assert broken == 2  # in front of the first function and between the two: neither was looked into
    assert inside == [4.0, 4.0]
    assert graphs == [["opaque", "add"]]
    assert runs == 1
    assert not waiting


@pytest.mark.parametrize("what", ["inside", "class", "setting"])
def test_the_compiler_comes_at_once_for_all_else(what: str) -> None:
    assert answer(ASKED, what) == [True, "torch._dynamo.utils"]


@pytest.mark.parametrize(("who", "environment"), [("alone", {"WORLD_SIZE": "2"}), ("user", {})])
def test_tensors_are_distributed_where_somebody_may_want_it(who: str, environment: dict[str, str]) -> None:
    there = int(torch.distributed.is_available())
    assert answer(DISTRIBUTED, who, **environment) == [there, there]


@BY_ITSELF
def test_transformers_finds_no_distributed_tensors_in_a_process_of_ours() -> None:
    assert answer(DISTRIBUTED, "alone") == [0, int(torch.distributed.is_available())]


def test_the_compiler_reads_a_mask_that_was_imported_before_it() -> None:
    assert answer(MASK) == [True, 1, "type"]


def test_models_are_built_in_two_threads() -> None:
    assert answer(THREADS) == ["cpu", 4, []]
