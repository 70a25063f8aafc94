"""Importing transformers' models without what they import for other tasks: 370 MB of memory that nobody here uses.

Seen with transformers 5.19 and torch 2.13: scikit-learn with pandas for one measure of assisted generation, SciPy for
matching boxes, Triton for a compiler of GPU code, PyTorch's compiler with SymPy for masks of unusual shapes and to tell
it of functions, and for a process that works alone tensors distributed over several. What is put off comes when it is
called; what a process that works alone was told, stays.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from multiprocessing import parent_process
from types import FunctionType, MappingProxyType, ModuleType
from typing import Any

import torch

COMPILER = "torch._dynamo"
INSIDE = MappingProxyType({f"{COMPILER}._trace_wrapped_higher_order_op": "TransformGetItemToIndex"})
LATER = MappingProxyType({"sklearn.metrics": "roc_curve", "scipy.optimize": "linear_sum_assignment"})
TRITON = "triton"  # PyTorch's compiler loads it wherever it is installed, without a GPU, too
_alone: list[bool] = []  # one entry where the process is our own
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # what torchrun tells each of its processes


@functools.cache
def load_transformers() -> None:
    """Import what every language model of transformers needs; what is loaded already stays as it is."""
    with postponed(LATER), unseen(TRITON), compiler_later():
        import transformers.loss.loss_utils
        import transformers.modeling_layers
        import transformers.models.auto.modeling_auto  # noqa: F401
    if _alone:
        gc.freeze()  # what imports left stays: collections need not look through it for what may go


@contextmanager
def postponed(functions: Mapping[str, str]) -> Iterator[list[_Later]]:
    """Inside, importing a function of ``functions``, by module, gives one that imports the module when it is called.

    Any other name loads the module at once, and so does importing it outside.
    """
    placed = {name: _Later(name, wanted) for name, wanted in functions.items() if name not in sys.modules}
    sys.modules.update(placed)
    try:
        yield [*placed.values()]
    finally:
        for name, module in placed.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


class _Later(ModuleType):
    """Stands for a module that is not imported yet; ``wanted`` is the function that it can give without."""

    def __init__(self, name: str, wanted: str) -> None:
        super().__init__(name)
        self._wanted = wanted
        self._given = lambda *args, **kwargs: getattr(import_module(name), wanted)(*args, **kwargs)

    def replace(self) -> None:
        """Put what is wanted wherever the function that stood for it was imported."""
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        real = getattr(import_module(self.__name__), self._wanted)
        for module in list(sys.modules.values()):
            if getattr(module, "__dict__", {}).get(self._wanted) is self._given:
                setattr(module, self._wanted, real)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            if name == self._wanted:
                return self._given
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)


@contextmanager
def unseen(package: str) -> Iterator[None]:
    """Inside, ``package`` cannot be imported, unless it is already, or there is a GPU to use it with."""
    if package in sys.modules or torch.cuda.is_available():
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]  # how Python is told that there is none
    try:
        yield
    finally:
        del sys.modules[package]
        if asked := sys.modules.get("torch.utils._triton"):  # it may have been told "no", and would remember it
            asked.has_triton_package.cache_clear()
            asked.get_triton_version.cache_clear()


@contextmanager
def compiler_later() -> Iterator[None]:
    """Inside, PyTorch's compiler is not loaded to be told of functions; it is told of them when it is loaded.

    What stood for a part of it is then that part: the compiler reads code, and could not read what loads a module.
    """
    if COMPILER in sys.modules:
        yield
        return
    with postponed(INSIDE) as parts:
        placed = sys.modules[COMPILER] = _Compiler(parts)
        try:
            yield
        finally:
            placed.leave()


class _Compiler(ModuleType):
    """Stands for PyTorch's compiler; takes down what it is told of functions, and gives way to it for all else."""

    def __init__(self, parts: Collection[_Later]) -> None:
        super().__init__(COMPILER)
        self._told: list[tuple[str, Any]] = []
        sys.meta_path.insert(0, _Informed(self._told, parts))

    def allow_in_graph(self, function: Any) -> Any:
        return self._take_down("allow_in_graph", function)

    def assume_constant_result(self, function: Any) -> Any:
        return self._take_down("assume_constant_result", function)

    def disable(self, fn: Any = None, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """Return ``fn`` as the compiler leaves it alone, as its own ``disable`` would."""
        if fn is None:
            return lambda fn: self.disable(fn, *args, **kwargs)
        if not isinstance(fn, FunctionType):  # a class or a module becomes something else
            return self._give_way().disable(fn, *args, **kwargs)

        @functools.cache
        def disabled(compiler: ModuleType) -> Callable[..., Any]:
            return compiler.disable(fn, *args, **kwargs)

        @functools.wraps(fn)
        def left_alone(*given: Any, **named: Any) -> Any:
            compiler = sys.modules.get(COMPILER)
            called = fn if compiler is None or isinstance(compiler, _Compiler) else disabled(compiler)
            return called(*given, **named)

        left_alone._torchdynamo_disable = True  # type: ignore[attr-defined]  # by which the compiler knows one
        return left_alone

    def leave(self) -> None:
        if sys.modules.get(COMPILER) is self:
            del sys.modules[COMPILER]

    def _take_down(self, word: str, function: Any) -> Any:
        if sys.modules.get(COMPILER) is not self:
            return getattr(self._give_way(), word)(function)
        self._told.append((word, function))
        return function

    def _give_way(self) -> Any:
        self.leave()
        return import_module(COMPILER)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # which is asked for to import a module inside
            raise AttributeError(name)
        return getattr(self._give_way(), name)


class _Informed(MetaPathFinder):
    """Finds PyTorch's compiler where it is, and once it is loaded passes on what the one in its place was told."""

    def __init__(self, told: list[tuple[str, Any]], parts: Collection[_Later]) -> None:
        self._told, self._parts = told, parts
        self._asking = False

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != COMPILER or self._asking:
            return None
        self._asking = True
        try:
            spec = find_spec(name)
        finally:
            self._asking = False
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            sys.meta_path.remove(self)
            for word, function in self._told:
                getattr(module, word)(function)
            for part in self._parts:
                part.replace()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def work_alone() -> None:
    """Let transformers find that PyTorch has no distributed tensors, which it remembers: for a process of our own.

    They take several processes, so not with a GPU, nor where a launcher or a process group says that there are some.
    """
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if torch.cuda.is_available() or several or parent_process() or any(name in os.environ for name in LAUNCHED):
        return
    _alone[:] = [True]
    from transformers.utils import import_utils

    asked: Any = getattr(import_utils, "is_torch_distributed_available", None)
    real = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        if hasattr(asked, "cache_info"):  # it would be asked again
            asked()
    finally:
        torch.distributed.is_available = real
