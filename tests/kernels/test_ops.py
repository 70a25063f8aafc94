"""The operators as torch sees them: schema and shape rules hold, compilation keeps them whole, nothing waits."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qtoolkit.evals.gpu_bench.contenders import random_weight
from qtoolkit.kernels import ops, selection
from qtoolkit.kernels.cuda import backend
from qtoolkit.kernels.selection import Grid, Problem

from .cuda_emulator import COMPILER, Emulator

N, K = 24, 64


def arguments(tokens: int, dtype: torch.dtype, group_size: int, with_bias: bool) -> tuple[Any, ...]:
    weight = random_weight(N, K, group_size, "cpu")
    bias = torch.randn(N).to(dtype) if with_bias else None
    return torch.randn(tokens, K).to(dtype), weight.packed(), weight.scales, bias, N, group_size, "neutral"


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize(("group_size", "with_bias"), [(-1, False), (32, True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_schema_and_shape_rule_of_the_linear_hold(
    tokens: int, group_size: int, with_bias: bool, dtype: torch.dtype
) -> None:
    torch.library.opcheck(torch.ops.qtoolkit.w4a8_linear, arguments(tokens, dtype, group_size, with_bias))


@pytest.mark.parametrize("shape", [(3, K), (0, K), (2, 5, K)])
def test_schema_and_shape_rule_of_the_quantizer_hold(shape: tuple[int, ...]) -> None:
    torch.library.opcheck(torch.ops.qtoolkit.quantize_tokens, (torch.randn(shape).bfloat16(),))


def test_compiled_code_keeps_the_operator_whole_for_any_number_of_tokens() -> None:
    x, *rest = arguments(7, torch.bfloat16, 32, True)

    def block(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(ops.w4a8_linear(x * 2, *rest))

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (7, 3, 1):
        assert torch.equal(compiled(x[:tokens]), block(x[:tokens]))


def test_a_layout_that_no_backend_has_is_named() -> None:
    with pytest.raises(ValueError, match=r"no backend is loaded for weight layout 'other'; loaded: .*neutral"):
        ops.w4a8_linear(*arguments(1, torch.bfloat16, -1, False)[:-1], "other")


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_what_is_not_chosen_says_why(device: str) -> None:
    """On a machine without a GPU every GPU backend has its reason, in words, and a layer runs all the same."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    choice = selection.choose(Problem(4096, 4096, 128, torch.bfloat16, device))
    reasons = {"cuda": "no CUDA device is available", "cpu": "needs a CUDA device"}
    if device == "cuda":
        assert choice.backend.name == "reference"
        assert set(choice.refused) == {"cpu", "cuda", "triton"}
        assert choice.refused["cuda"] == choice.refused["triton"] == reasons[device]
    for gpu in ("qtoolkit.kernels.cuda.backend", "qtoolkit.kernels.triton.backend"):
        for found in __import__(gpu, fromlist=["BACKENDS"]).BACKENDS:
            assert found.refuse(Problem(4096, 4096, 128, torch.bfloat16, device)) == reasons[device]


class Recorder(TorchDispatchMode):
    """Notes the name of every operator that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(operator.overloadpacket.__name__)
        return operator(*args, **(kwargs or {}))


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
@pytest.mark.parametrize("tokens", [3, 20])  # one launch, two
@pytest.mark.parametrize(("group_size", "grid"), [(-1, Grid.PLAIN), (128, Grid.FOLDED)])
def test_a_call_on_hopper_allocates_from_torch_and_waits_for_nothing(
    tokens: int, group_size: int, grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a graph may capture it: what it calls is views and empty tensors, and the launches between them."""
    emulator = Emulator(tmp_path)

    @contextmanager
    def place_of(x: torch.Tensor) -> Iterator[backend.Place]:
        yield emulator.place(everything_readable=True)

    monkeypatch.setattr(backend, "place_of", place_of)
    weight = random_weight(128, 256, group_size, "cpu", fold=grid is Grid.FOLDED)
    problem = Problem(256, 128, group_size, torch.bfloat16, "cuda", grid)
    own = backend.prepare(weight.packed(), weight.scales, problem)
    x, bias = torch.randn(tokens, 256).bfloat16(), torch.randn(128).bfloat16()
    with Recorder() as seen:
        out = backend.run(x, *own, bias, 128, group_size, grid)
    assert seen.names <= {"new_empty", "empty", "view", "_unsafe_view", "alias", "clone"}
    assert out.isfinite().all()
