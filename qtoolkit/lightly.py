"""Importing transformers' models without what they import for other tasks: 290 MB of memory that nobody here uses.

Seen with transformers 5.19 and torch 2.13: scikit-learn with pandas for one measure of assisted generation, SciPy for
matching boxes, and Triton for a compiler of GPU code. Two names stand for their functions until they are called.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import Any

import torch

LATER = MappingProxyType({"sklearn.metrics": "roc_curve", "scipy.optimize": "linear_sum_assignment"})
TRITON = "triton"  # PyTorch's compiler loads it wherever it is installed, without a GPU, too


def load_transformers() -> None:
    """Import what every language model of transformers needs; what is loaded already stays as it is."""
    with postponed(LATER), unseen(TRITON):
        import transformers.loss.loss_utils
        import transformers.models.auto.modeling_auto  # noqa: F401


@contextmanager
def postponed(functions: Mapping[str, str]) -> Iterator[None]:
    """Inside, importing a function of ``functions``, by module, gives one that imports the module when it is called.

    Any other name loads the module at once, and so does importing it outside.
    """
    placed = {name: _Later(name, wanted) for name, wanted in functions.items() if name not in sys.modules}
    sys.modules.update(placed)
    try:
        yield
    finally:
        for name, module in placed.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


class _Later(ModuleType):
    """Stands for a module that is not imported yet; ``wanted`` is the function that it can give without."""

    def __init__(self, name: str, wanted: str) -> None:
        super().__init__(name)
        self._wanted = wanted

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            if name == self._wanted:
                return lambda *args, **kwargs: getattr(import_module(self.__name__), name)(*args, **kwargs)
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
        for asked in (torch.utils._triton.has_triton_package, torch.utils._triton.get_triton_version):
            asked.cache_clear()  # they may have been told "no", and would remember it
