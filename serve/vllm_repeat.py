"""Steps of decoding without Python between operators: what a compiled graph calls is recorded once and then repeated.

What CUDA graphs are for GPUs. For a number of tokens a compiled graph makes the same calls with the same sizes in every
step; with memory that stays where it is, addresses are the same, too. So the Python that torch generated runs once with
other meanings of its few names, which make each call and note it; after that one call in C++ makes them all. Results
are the same bits: it is the same machine code on the same numbers. A graph in which anything else is named, and a batch
that is not of single tokens, run as ever.
"""

from __future__ import annotations

import builtins
import ctypes
import dis
from collections.abc import Callable, Sequence
from functools import wraps
from types import BuiltinFunctionType, FunctionType, ModuleType, SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._dynamo.aot_compile import AOTCompiledFunction
from torch._inductor.output_code import CompiledFxGraph
from vllm.distributed.kv_transfer import has_kv_transfer_group
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.utils.torch_utils import _resolve_layer_name

from qtoolkit.kernels.cpu import backend, library
from qtoolkit.kernels.cpu.attention import library as attention
from qtoolkit.kernels.cpu.repeat import MOST, Calls, Memory
from qtoolkit.serve.vllm_attention import OwnAttention

ATTENTION = "unified_attention_with_output"
OPERATORS = (backend.OPERATOR, backend.GATED, ATTENTION)
DTYPES = {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}
# What the generated code may name beside its own functions, which are compiled C++.
HARMLESS = {"reinterpret_tensor", "assert_size_stride", "assert_alignment"}
NAMES = {"torch", "empty_strided_cpu", *HARMLESS}
ATTRIBUTES = {"clear", "ops", "qtoolkit", "vllm", "default", *OPERATORS, *DTYPES}
MOST_TOKENS = 32  # of a recorded step; with more, Python's share is small
MOST_RECORDINGS = 8  # for one number of tokens: an engine that moves its memory in every step would only lose time


def repeat_steps() -> None:
    """Have compiled graphs with our operators repeat steps of single tokens; doing it twice changes nothing."""
    if hasattr(CompiledFxGraph.__call__, "repeats_steps"):
        return
    graphs = Graphs()
    compiled, model = CompiledFxGraph.__call__, AOTCompiledFunction.__call__

    @wraps(compiled)
    def run_graph(self: CompiledFxGraph, inputs: Sequence[Any]) -> Any:
        function = getattr(self.current_callable, "__func__", None)
        if not isinstance(function, FunctionType) or not isinstance(inputs, list):
            return compiled(self, inputs)
        return graphs.run(function, inputs, lambda given: compiled(self, given))

    @wraps(model)
    def run_model(self: AOTCompiledFunction, *given: Any, **named: Any) -> Any:
        if named or graphs.batch() is None:
            graphs.forget()
            return model(self, *given, **named)
        return graphs.run_model(self.fn, given, lambda: model(self, *given))

    run_graph.repeats_steps = graphs  # type: ignore[attr-defined]
    CompiledFxGraph.__call__ = run_graph  # type: ignore[method-assign]
    AOTCompiledFunction.__call__ = run_model  # type: ignore[method-assign]


class Graphs:
    """The compiled graphs of a process, and short ways from a model's inputs to a recorded step.

    What torch does around a graph, mostly gathering all weights in a list, takes a millisecond, since weights have
    pushed all of Python out of the caches by then. A short way leaves that out, after a step that has found
    everything where it was when the calls were recorded, and until the next step that is not of single tokens.
    """

    def __init__(self) -> None:
        self.graphs: WeakKeyDictionary[FunctionType, Graph] = WeakKeyDictionary()
        self.short: dict[tuple[Any, ...], Step] = {}
        self.last: tuple[Step, Tensor] | None = None  # which step was repeated, and what it returned

    def batch(self) -> Any:
        """Return vLLM's description of this step's batch if it may be repeated, else None."""
        return None if torch.autograd.profiler._is_profiler_enabled else single_tokens()

    def forget(self) -> None:
        """Look at everything again at the next step.

        A model that runs without a description of a batch warms up, perhaps for another engine: what was recorded holds
        the caches of the one before.
        """
        self.short.clear()
        if is_forward_context_available() and get_forward_context().attn_metadata is None:
            self.graphs.clear()

    def run(self, function: FunctionType, inputs: list[Any], plain: Callable[[list[Any]], Any]) -> Any:
        """Return what one graph computes; see ``Graph.run``."""
        batch = self.batch()
        if batch is None:
            return plain(inputs)
        graph = self.graphs.get(function)
        if graph is None:
            graph = self.graphs[function] = Graph(function)
        step = graph.found(inputs, batch)
        if step is None:
            return graph.run(inputs, batch, plain)
        inputs.clear()
        result = step.repeat(batch)
        if len(result) == 1 and isinstance(result[0], Tensor):
            self.last = step, result[0]
        return result

    def run_model(self, model: object, given: tuple[Any, ...], plain: Callable[[], Any]) -> Any:
        """Return what a model computes from ``given``: by a short way, or else ``plain``."""
        key = (id(model), *((v.data_ptr(), v.shape) if isinstance(v, Tensor) else id(v) for v in given))
        batch, step = self.batch(), self.short.get(key)
        if step is not None and step.takes(batch):
            return step.repeat(batch)[0]
        self.last = None
        result = plain()
        if self.last is not None and self.last[1] is result:  # nothing is done with what the one graph returns
            self.short[key] = self.last[0]
        self.last = None
        return result


class Graph:
    """A compiled graph: ``call(self, args)`` as torch generated it, and its recorded steps by sizes of the inputs."""

    def __init__(self, function: FunctionType) -> None:
        self.function = function
        self.strange = strange_names(function)
        self.steps: dict[tuple[int, ...], Step] = {}
        self.recordings: dict[tuple[int, ...], int] = {}

    def found(self, inputs: list[Any], batch: Any) -> Step | None:
        """Return the recorded step of these inputs, if they and the caches are where they were."""
        step = self.steps.get(sizes_of(inputs))
        return step if step is not None and step.places == places_of(inputs) and step.fits(batch) else None

    def run(self, inputs: list[Any], batch: Any, plain: Callable[[list[Any]], Any]) -> Any:
        """Return what the graph computes, and record it; by ``plain`` where its calls are not to be repeated."""
        sizes = sizes_of(inputs)
        made = self.recordings.get(sizes, 0)
        if self.strange or made >= MOST_RECORDINGS:
            return plain(inputs)
        step = Step(places_of(inputs), batch)
        result = step.record(self.function, inputs)
        self.recordings[sizes] = MOST_RECORDINGS if step.reason else made + 1
        self.steps.pop(sizes, None)
        if not step.reason:
            self.steps[sizes] = step
        return result


def sizes_of(inputs: list[Any]) -> tuple[int, ...]:
    """Return the numbers among a graph's inputs."""
    return tuple(value for value in inputs if isinstance(value, int))


def places_of(inputs: list[Any]) -> list[int]:
    """Return where the tensors among a graph's inputs lie."""
    return [value.data_ptr() for value in inputs if isinstance(value, Tensor)]


def strange_names(function: FunctionType) -> set[str]:
    """Return what keeps a graph from being recorded: names of unknown meaning, or of ours those that are not there."""
    code, given = function.__code__, function.__globals__
    asked = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    strange = {
        name for name in asked if name not in NAMES and not known(given.get(name)) and not is_builtin(name, given)
    }
    strange |= {name for name in code.co_names if name not in asked and name not in ATTRIBUTES}
    return strange | {name for name in (backend.OPERATOR, ATTENTION) if name not in code.co_names}


def is_builtin(name: str, given: dict[str, Any]) -> bool:
    """Say whether a name is Python's own."""
    return name not in given and hasattr(builtins, name)


def known(value: object) -> bool:
    """Say whether a global of generated code is a constant or a function in C++ whose file we know."""
    if isinstance(value, BuiltinFunctionType):
        return isinstance(value.__self__, ModuleType) and bool(getattr(value.__self__, "__file__", None))
    return isinstance(value, Tensor)


def single_tokens() -> Any:
    """Return vLLM's description of this step's batch if all layers share it and it is of single tokens, else None."""
    if not is_forward_context_available() or has_kv_transfer_group():
        return None
    described = get_forward_context().attn_metadata
    if not isinstance(described, dict) or not described:
        return None
    batch = next(iter(described.values()))
    alike = all(other is batch for other in described.values())
    if not alike or getattr(batch, "max_query_len", 0) != 1 or not 0 < batch.num_actual_tokens <= MOST_TOKENS:
        return None
    return batch


class Step:
    """The calls of one graph for one number of tokens, and the memory between them.

    ``reason`` says why they cannot be repeated, and is empty if they can.
    """

    def __init__(self, places: list[int], batch: Any) -> None:
        self.places = places
        self.first = batch
        self.batch = attention.Batch()
        self.calls, self.memory = Calls(), Memory()
        self.layers: list[tuple[Any, Tensor]] = []  # and their caches
        self.output: list[Any] = []
        self.reason = ""

    def fits(self, batch: Any) -> bool:
        """Say whether another batch is of the kind that was recorded, and the caches are where they were."""
        return self.takes(batch) and all(layer.kv_cache is cache for layer, cache in self.layers)

    def takes(self, batch: Any) -> bool:
        """Say whether another batch is of the kind that was recorded."""
        layer = self.layers[0][0]
        return batch.num_actual_tokens == self.first.num_actual_tokens and bool(layer.impl.single(layer, batch))

    def repeat(self, batch: Any) -> list[Any]:
        """Make all calls for another batch of that many tokens and return the graph's results."""
        self.layers[0][0].impl.step(batch).tell(self.batch)
        self.calls.repeat()
        return [value.clone() if isinstance(value, Tensor) else value for value in self.output]

    def record(self, function: FunctionType, inputs: list[Any]) -> Any:
        """Run the generated code, noting its calls; returns its results."""
        given = function.__globals__
        names = {
            "__builtins__": builtins,
            "empty_strided_cpu": self.memory.empty,
            **{name: given[name] for name in HARMLESS if name in given},
            "torch": Torch(self),
        }
        for name, value in ((name, given[name]) for name in function.__code__.co_names if name in given):
            if isinstance(value, BuiltinFunctionType) and name not in names and known(value):
                names[name] = self._kernel(value)
            elif isinstance(value, Tensor):
                names[name] = value
        self.output = list(FunctionType(function.__code__, names)(None, inputs))
        return [value.clone() if isinstance(value, Tensor) else value for value in self.output]

    def _kernel(self, kernel: BuiltinFunctionType) -> Callable[..., None]:
        """Return the meaning of a function that torch compiled: make its call without its Python face."""
        module: Any = kernel.__self__
        try:
            address = ctypes.cast(ctypes.CDLL(module.__file__)[kernel.__name__], ctypes.c_void_p).value
        except (OSError, AttributeError) as error:
            self.reason = f"a kernel's file has another form: {error}"
            return kernel

        def call(*given: Any) -> None:
            if address is None or len(given) > MOST or not all(isinstance(value, (Tensor, int)) for value in given):
                self.reason = f"a kernel takes {len(given)} arguments, or others than tensors and sizes"
                kernel(*given)
            else:
                self.calls.make(address, [v.data_ptr() if isinstance(v, Tensor) else v for v in given])

        return call

    def linear(
        self, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, n: int, group_size: int, gated: bool
    ) -> Tensor:
        """Make and note a W4A8 product; see ``ops.w4a8_linear``."""
        y = self.memory.empty((x.shape[0], n), (n, 1), x.dtype)
        try:
            call = backend.described(x, weight, scales, bias, n, group_size, gated, y)
        except ValueError as error:
            self.reason = str(error)
            return backend.run(x, weight, scales, bias, n, group_size, gated=gated)
        self.calls.make_own(address_of(library.load().functions.qtk_linear_again), call)
        return y

    def attend(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor, name: Any, *more: Any) -> None:
        """Make and note a layer's attention, or have vLLM make it and give up."""
        layer = get_forward_context().no_compile_layers[_resolve_layer_name(name)]
        if any(value is not None for value in more) or not is_ours(layer, self.first):
            self.reason = "a layer's attention is not ours"
            torch.ops.vllm.unified_attention_with_output.default(query, key, value, output, name, *more)
            return
        step = layer.impl.step(self.first)
        step.tell(self.batch)
        call = step.again(query, key, value, layer.kv_cache, output, self.batch)
        self.calls.make_own(address_of(attention.load().qta_step_again), call)
        self.layers.append((layer, layer.kv_cache))


def is_ours(layer: Any, batch: Any) -> bool:
    """Say whether a layer attends for a batch of single tokens by our kernel."""
    return isinstance(layer.impl, OwnAttention) and layer.impl.single(layer, batch)


class Torch:
    """What generated code finds under the name ``torch``: dtypes and the operators that we know."""

    def __init__(self, step: Step) -> None:
        def plain(x: Tensor, w: Tensor, scales: Tensor, bias: Tensor | None, n: int, group_size: int) -> Tensor:
            return step.linear(x, w, scales, bias, n, group_size, gated=False)

        def gated(x: Tensor, w: Tensor, scales: Tensor, bias: Tensor | None, n: int, group_size: int) -> Tensor:
            return step.linear(x, w, scales, bias, n, group_size, gated=True)

        own = {backend.OPERATOR: SimpleNamespace(default=plain), backend.GATED: SimpleNamespace(default=gated)}
        vllm = {ATTENTION: SimpleNamespace(default=step.attend)}
        self.ops = SimpleNamespace(qtoolkit=SimpleNamespace(**own), vllm=SimpleNamespace(**vllm))

    def __getattr__(self, name: str) -> Any:
        if name not in DTYPES:
            raise AttributeError(name)
        return getattr(torch, name)


def address_of(function: Any) -> int:
    """Return where a function of a loaded library lies."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0
